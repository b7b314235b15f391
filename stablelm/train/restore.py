"""Where a run begins: at step 0, at its newest valid checkpoint, or with another run's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stablelm.checkpoint import keep
from stablelm.checkpoint.portable import load_tensors
from stablelm.config.schema import Config
from stablelm.data.loader import Loader
from stablelm.engine.base import Engine
from stablelm.engine.mesh import Ranks
from stablelm.errors import CheckpointError, ConfigError
from stablelm.train.prepare import refuse_other_run
from stablelm.train.progress import Progress


def find(config: Config, identity: dict[str, Any], resume: str, message: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, verified file by file, or None for a new run. Call on rank 0.

    Raises CheckpointError if the one asked for is damaged, ConfigError if it is another run's.
    """
    if resume == "none":
        return None
    if resume == "auto":
        root = Path(str(config.checkpoint.dir))
        keep.clean_staging(root)
        found = keep.newest_valid(
            root, on_damaged=lambda path, why: message(f"warning: {path} is damaged ({why}); trying the one before it")
        )
        if found is None and keep.step_directories(root):
            raise CheckpointError(
                f"no checkpoint in {root} is intact; restore one from a copy, or start anew under another run.dir"
            )
    else:
        found = keep.resolve_checkpoint(Path(resume))
    if found is not None:
        state = keep.read_state(found)
        refuse_other_run(state["identity"], identity, str(found), step=state["step"])
    return found


def resume_from(checkpoint: Path, engine: Engine, loader: Loader, ranks: Ranks, progress: Progress) -> None:
    """Loads weights, moments, position in the data and counters, in place."""
    load_tensors(checkpoint / "tensors", engine.tensors(), ranks.cpu_group)
    state = keep.read_state(checkpoint)
    loader.load(state["data"])
    progress.step, progress.tokens = state["step"], state["tokens"]
    progress.checkpointed_step = state["step"]


def weights_from(path: str, engine: Engine, ranks: Ranks) -> None:
    """Loads the weights alone, of a run or checkpoint directory, into a new run."""
    found = ranks.together().first(lambda: keep.resolve_checkpoint(Path(path)))
    try:
        load_tensors(found / "tensors", engine.tensors(optimizer=False), ranks.cpu_group, partial=True)
    except CheckpointError as error:
        raise ConfigError(f"run.init_from={found} does not fit this model: {error}") from error
