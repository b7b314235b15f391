"""A checkpoint's weights in one safetensors file, for programs that know nothing of ours."""

import math
import os
import uuid
from pathlib import Path

from stablelm.checkpoint import selection
from stablelm.checkpoint.files import FULL, UNWRITABLE, sync_directory
from stablelm.checkpoint.manifest import TENSORS, read_commit
from stablelm.checkpoint.reader import Reader, bytes_of
from stablelm.checkpoint.remote_path import checkpoint_path
from stablelm.checkpoint.tensor_index import Slot, header, read_index
from stablelm.errors import ConfigError, StorageError

_PREFIX = "model."


def consolidate(checkpoint: str, out: Path, *, elsewhere: str | None = None) -> str:
    """Writes the weights, named as in the decoder, to a new file; returns a line that says what is in it.

    `elsewhere`: where a run has its checkpoints, if not in its directory.

    Tensors go through memory one at a time. Raises CheckpointError for a missing or damaged checkpoint, ConfigError
    where `out` cannot be made, StorageError where it cannot be written to the end.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already; name a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist; create it first")
    found = selection.resolve_checkpoint(checkpoint, elsewhere=checkpoint_path(elsewhere) if elsewhere else None)
    reader = Reader(found / TENSORS, read_index(found / TENSORS))
    held = reader.index.tensors
    slots = {name: Slot(name.removeprefix(_PREFIX), held[name].dtype, held[name].shape) for name in sorted(held)}
    weights = {name: slot for name, slot in slots.items() if name.startswith(_PREFIX)}
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(header(weights.values(), {"format": "pt", "step": str(read_commit(found).step)}))
            for name in weights:
                tensor = reader.tensor(name)
                file.write(bytes_of(tensor) if tensor.numel() else b"")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        if error.errno in FULL | UNWRITABLE:
            raise StorageError(f"cannot write {out} ({error.strerror})") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    elements = sum(math.prod(slot.shape) for slot in weights.values())
    return f"{out}: {len(weights)} tensors, {elements / 1e6:.2f} M elements of {found}"
