"""A checkpoint's weights in one safetensors file, for programs that know nothing of ours."""

import json
import math
import os
import struct
import uuid
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata

from stablelm.checkpoint import keep
from stablelm.checkpoint.files import FULL, UNWRITABLE, sync_directory
from stablelm.checkpoint.manifest import TENSORS, read_commit
from stablelm.checkpoint.places import place
from stablelm.checkpoint.portable import load_tensors, read_metadata
from stablelm.checkpoint.streams import bytes_of
from stablelm.errors import ConfigError, StorageError

# https://github.com/huggingface/safetensors#format: an 8-byte length, a JSON header, then the tensors' bytes in order.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
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
    found = keep.resolve_checkpoint(checkpoint, elsewhere=place(elsewhere) if elsewhere else None)
    held = cast(dict[str, metadata.TensorStorageMetadata], read_metadata(found / TENSORS).state_dict_metadata)
    weights = {name: held[name] for name in sorted(held) if name.startswith(_PREFIX)}
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(_header(weights, read_commit(found).step))
            for name, entry in weights.items():
                tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
                load_tensors(found / TENSORS, {name: tensor}, None, partial=True)
                file.write(bytes_of(tensor) if tensor.numel() else b"")  # little-endian, as all that torch runs on
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
    elements = sum(math.prod(entry.size) for entry in weights.values())
    return f"{out}: {len(weights)} tensors, {elements / 1e6:.2f} M elements of {found}"


def _header(weights: dict[str, metadata.TensorStorageMetadata], step: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step)}}
    start = 0
    for name, entry in weights.items():
        stop = start + math.prod(entry.size) * entry.properties.dtype.itemsize
        kind = DTYPES[entry.properties.dtype]
        entries[name.removeprefix(_PREFIX)] = {"dtype": kind, "shape": list(entry.size), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
