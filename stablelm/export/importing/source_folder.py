"""A folder of another program that holds a model: config.json and safetensors files, in the layout of transformers.

It may come from anybody: sizes are bounded, names in it stay inside it, pickles are not opened. transformers itself
was tried: it opens pickles and code of the folder where a flag says so, and holds the whole model in memory.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm.errors import ConfigError
from stablelm.json_text import checked, load, parse
from stablelm.printable import few
from stablelm.small_files import open_regular, read_small

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_BYTES = 4 << 20
DTYPES = ("F32", "BF16", "F16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours comes from: `shape` is the source's; `columns` of it, transposed where ours is."""

    name: str
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    transposed: bool = False


class SourceFolder:
    """`config` is config.json as it is, `shapes` those of all tensors by name. Raises ConfigError in a sentence."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise ConfigError(f"--from {path} is not a directory; name a folder with {CONFIG} and safetensors files")
        self.config = _config(path)
        indexed = None if (path / WHOLE).exists() else _weight_map(path)
        files = [WHOLE] if indexed is None else list(dict.fromkeys(indexed.values()))
        # Headers are read without torch, which takes seconds to import.
        self._headers = {file: self._opened(file, "np") for file in files}
        self._opened_for_torch: dict[str, Any] = {}
        held = {name: file for file, header in self._headers.items() for name in list(header.keys())}
        absent = [name for name, file in (indexed or {}).items() if held.get(name) != file]
        if absent:
            raise ConfigError(
                f"{path / INDEX} names tensors that are not in their files ({few(absent)}); download the folder again"
            )
        self._files = held if indexed is None else indexed
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._shape(name) for name in self._files}

    def read(self, origin: Origin) -> "Tensor":
        """The tensor as ours is oriented, on the CPU, fp32. Raises ConfigError where a value is not finite."""
        import torch
        from safetensors import SafetensorError

        try:
            handle = self._tensors(self._files[origin.name])
            if origin.columns is None:
                found = handle.get_tensor(origin.name)
            else:
                first, last = origin.columns
                found = handle.get_slice(origin.name)[..., first:last]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ConfigError(f"{self.path}: {origin.name} cannot be read ({error})") from error
        found = found.t() if origin.transposed else found
        found = found.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not found.isfinite().all():
            raise ConfigError(
                f"{self.path}: {origin.name} holds values that are not finite; import another copy of the model"
            )
        return found

    def dtypes(self) -> list[str]:
        """Names of the dtypes that occur."""
        return sorted({self._slice(name).get_dtype() for name in self._files})

    def _tensors(self, file: str) -> Any:
        if file not in self._opened_for_torch:
            self._opened_for_torch[file] = self._opened(file, "pt")
        return self._opened_for_torch[file]

    def _opened(self, file: str, framework: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.path / file
        try:
            os.close(open_regular(path))
            return safe_open(path, framework=framework)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist, and {INDEX} names it; download the folder again") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path} is not a complete safetensors file ({error}); download it again") from error

    def _slice(self, name: str) -> Any:
        return self._headers[self._files[name]].get_slice(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        found = self._slice(name)
        if found.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{self.path}: {name} has dtype {found.get_dtype()}; import a model whose weights are fp32, bf16 or "
                "fp16, not quantised ones"
            )
        return tuple(found.get_shape())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        found = load(read_small(path, CONFIG_BYTES))
    except FileNotFoundError:
        raise ConfigError(f"--from {folder} is no model: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path} ({why}); give a readable one") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object, so --from {folder} is no model")
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    path = folder / INDEX
    try:
        files = checked(parse(read_small(path), dict[str, Any]).get("weight_map"), dict[str, str])
    except FileNotFoundError:
        raise ConfigError(_no_weights(folder)) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the weight_map of {path} ({why}); download it again") from None
    outside = [file for file in files.values() if file != os.path.basename(file) or not file.endswith(".safetensors")]
    if outside:
        raise ConfigError(f"{path} names {outside[0]!r:.100}, which is not a safetensors file of its folder")
    return files


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"--from {folder} holds its weights as a pickle ({few(pickles)}), which can run code when it is opened; "
            "convert it to safetensors where you trust it, by save_pretrained of transformers"
        )
    return f"--from {folder} is no model: it has neither {WHOLE} nor {INDEX}"
