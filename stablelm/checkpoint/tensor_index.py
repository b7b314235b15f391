"""What the files of `tensors/` hold: index.json for all of them, and the safetensors header of each.

index.json gives each tensor's dtype, whole shape and pieces. A piece is a rectangle of the whole: the file it is in,
its offsets and its sizes. Each is one range of the whole's row-major order, since engines cut tensors in rows or in
flat ranges. In its file a piece carries the tensor's name, and where it is not all of it the slices too:
`model.embedding.weight[128:256,0:64]`. Nothing read from a checkpoint is believed before it was checked here.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stablelm import json_text
from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.errors import CheckpointError

INDEX = "index.json"
EARLIER = ".metadata"
"""The file of the format of stablelm 0.1, which was a pickle."""
LARGEST_INDEX = 1 << 30

Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
_TORCH = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
DTYPES: dict[str, torch.dtype] = dict(zip(get_args(Dtype), _TORCH, strict=True))
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = Annotated[tuple[json_text.Count, ...], Field(max_length=16)]


class EarlierFormat(CheckpointError):
    """The checkpoint was saved by a version whose format is no longer read."""


class Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Piece(Checked):
    """A rectangle of a tensor: corner and sizes, and the file of the directory that holds it."""

    file: Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}-[0-9]{1,3}\.safetensors$")]
    offsets: Shape
    sizes: Shape

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def start(self, shape: Sequence[int]) -> int:
        """The first element's place in the row-major order of a tensor of `shape`."""
        place = 0
        for offset, size in zip(self.offsets, shape, strict=True):
            place = place * size + offset
        return place


class TensorEntry(Checked):
    """One tensor."""

    dtype: Dtype
    shape: Shape
    pieces: tuple[Piece, ...]

    @model_validator(mode="after")
    def _pieces_are_of_it(self) -> "TensorEntry":
        for piece in self.pieces:
            if not len(piece.offsets) == len(piece.sizes) == len(self.shape) or any(
                offset + size > whole
                for offset, size, whole in zip(piece.offsets, piece.sizes, self.shape, strict=True)
            ):
                raise ValueError(f"a piece at {piece.offsets} of sizes {piece.sizes} is not inside {self.shape}")
            if not _contiguous(piece.sizes, self.shape):
                raise ValueError(
                    f"a piece of sizes {piece.sizes} is not a range of the row-major order of {self.shape}"
                )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def complete(self) -> bool:
        """Whether the pieces cover the tensor, each element exactly once."""
        reached = 0
        for start, count in sorted((piece.start(self.shape), piece.count) for piece in self.pieces if piece.count):
            if start != reached:
                return False
            reached += count
        return reached == math.prod(self.shape)


class Slot(NamedTuple):
    """A tensor of a safetensors file: its name there, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorIndex(Checked):
    """index.json."""

    version: Literal[1] = 1
    tensors: dict[Annotated[str, Field(min_length=1, max_length=4096)], TensorEntry]

    @model_validator(mode="after")
    def _names_in_files_differ(self) -> "TensorIndex":
        for file, slots in self.files.items():
            if len({slot.name for slot in slots}) < len(slots):
                raise ValueError(f"two pieces have one name in {file}")
        return self

    @cached_property
    def files(self) -> dict[str, list[Slot]]:
        """What each file must hold."""
        found: dict[str, list[Slot]] = {}
        for name, entry in self.tensors.items():
            for piece in entry.pieces:
                slot = Slot(name_in_file(name, entry.shape, piece.offsets, piece.sizes), entry.dtype, piece.sizes)
                found.setdefault(piece.file, []).append(slot)
        return found


def _contiguous(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a block of `sizes` is one range of the row-major order: whole in all axes behind the first long one."""
    first = next((axis for axis, size in enumerate(sizes) if size > 1), len(sizes))
    return 0 in sizes or tuple(sizes[first + 1 :]) == tuple(shape[first + 1 :])


def name_in_file(name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str:
    """The name of a piece: the tensor's own if it is all of it."""
    if tuple(sizes) == tuple(shape):
        return name
    return f"{name}[{','.join(f'{offset}:{offset + size}' for offset, size in zip(offsets, sizes, strict=True))}]"


def read_index(directory: CheckpointPath) -> TensorIndex:
    """Which tensors a directory holds, and where; checked, but for whether they are whole and what the files hold.

    Raises CheckpointError (EarlierFormat for what stablelm 0.1 saved), StoreError.
    """
    path = directory / INDEX
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file")
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX} bytes")
        return json_text.parse_into(path.read_bytes(), TensorIndex)
    except StoreError:
        raise
    except FileNotFoundError as error:
        if (directory / EARLIER).is_file():
            raise EarlierFormat(
                f"{directory.parent} was saved by stablelm 0.1, in a format that this version does not read: "
                "resume or evaluate it with stablelm 0.1.0, the last version that does"
            ) from error
        raise CheckpointError(f"cannot read {path} ({error.strerror}): not a checkpoint, or incomplete") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): load another checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"refused to read {path} ({reason(error)}): load another checkpoint") from error


def reason(error: Exception) -> str:
    """What is wrong, in a short line."""
    return (str(error).splitlines() or ["unreadable"])[0][:200]


def header(slots: Iterable[Slot], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of the tensors, in their order, in a safetensors file.

    https://github.com/huggingface/safetensors#format: an 8-byte length, JSON, then the bytes without gaps.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for slot in slots:
        stop = start + slot.nbytes
        entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
