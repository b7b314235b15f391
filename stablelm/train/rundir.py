"""The run directory: created once by rank 0, its failures known to all ranks."""

import errno
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.errors import StorageError
from stablelm.observe import provenance


def create(config: Config, identity: dict[str, Any], tokenizer: str, ranks: Ranks, argv: list[str]) -> int:
    """Writes config.yaml, identity.json, the tokenizer and this attempt's provenance; returns the attempt's number, from 1.

    Raises StorageError on every rank if rank 0 cannot write.
    """
    run_dir = Path(config.run.dir)

    hosts = list(dict.fromkeys(ranks.gather(socket.gethostname())))

    def write() -> int:
        run_dir.mkdir(parents=True, exist_ok=True)
        _replace(run_dir / "config.yaml", dump(config))
        # Kept beside the checkpoints, so that a run that was moved can still be evaluated.
        shutil.copyfile(tokenizer, run_dir / "tokenizer.model")
        _replace(run_dir / "identity.json", json.dumps(identity, indent=1) + "\n")
        return provenance.write(run_dir, argv, ranks.world_size, hosts)

    return first_rank_writes(ranks, run_dir, write)


def first_rank_writes(ranks: Ranks, where: Path, write: Callable[[], Any]) -> Any:
    """Runs `write` on rank 0 and gives its result to all; an OSError becomes a StorageError on all."""
    result, problem = None, None
    if ranks.is_first:
        try:
            result = write()
        except OSError as error:
            problem = storage_problem(where, error)
    result, problem = ranks.broadcast((result, problem))
    if problem:
        raise StorageError(problem)
    return result


def storage_problem(where: Path, error: OSError) -> str:
    """One sentence for a storage that does not take what we write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "free some space" if full else "name a run.dir that can be written"
    return f"{where} cannot be written ({error.strerror or error}); {mend} and run again"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
