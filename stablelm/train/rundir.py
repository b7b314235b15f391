"""The run directory: created once by rank 0, its failures known to all ranks."""

import json
import socket
from pathlib import Path
from typing import Any

from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.data.storage.options import gather_seen
from stablelm.engine.mesh import Ranks
from stablelm.new_files import replace_file
from stablelm.observe import provenance
from stablelm.observe.sinks import storage_error
from stablelm.train import attempts

RESOLVED = "# What the keys of config.yaml became in the last attempt. To start a run anew, feed config.yaml.\n"


def create(
    config: Config,
    asked: Config,
    identity: dict[str, Any],
    files: dict[str, list[str]],
    tokenizer: str,
    ranks: Ranks,
    argv: list[str],
    attempt: int,
) -> int:
    """Writes config.yaml, resolved.yaml, identity.json, the tokenizer and provenance; returns the attempt's number.

    `asked` is written as config.yaml, the resolved `config` beside it. Attempts are counted from 1; `attempt` is the
    number that was free when this one began (see `attempts.take`).
    `files` are the lists of remote files by asked path, which data_files.json keeps for the next attempt.
    Raises StorageError on every rank if rank 0 cannot write, ConfigError if another start holds the run.
    """
    run_dir = Path(config.run.dir)

    hosts = list(dict.fromkeys(ranks.gather(socket.gethostname())))

    def write() -> int:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            number = attempts.take(run_dir, attempt)
            replace_file(run_dir / "config.yaml", dump(asked))
            replace_file(run_dir / "resolved.yaml", RESOLVED + dump(config))
            # Kept beside the checkpoints, so that a run that was moved can still be evaluated.
            replace_file(run_dir / "tokenizer.model", Path(tokenizer).read_bytes())
            replace_file(run_dir / "identity.json", json.dumps(identity, indent=1) + "\n")
            replace_file(run_dir / "data_files.json", json.dumps(files, indent=1) + "\n")
            gather_seen(run_dir)
            return provenance.write(run_dir, argv, ranks.world_size, hosts, attempt=number)
        except OSError as error:
            raise storage_error(run_dir, error) from error

    return ranks.together().first(write)
