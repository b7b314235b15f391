"""A CUDA device in a process without one: torch says that there is an H100, whose tensors must be fake.

It cannot be taken away again and other tests want none: only for processes that do nothing else.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_name("device.cpp")
DEVICES = 8


def obstacle() -> str:
    """Why it cannot be made here; '' if it can."""
    import torch

    if torch.version.cuda is not None:
        return "torch is built with CUDA: tests/gpu asks a real device"
    return "" if _compiler() else "a simulated device needs a C++ compiler"


def load() -> None:
    """Makes the device. Before torch is imported, which looks for devices then."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def library() -> Path:
    """The compiled `SOURCE`, from a cache folder if it was compiled for this torch before."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch, version = Path(spec.origin).parent, importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version} {torch}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stablelm-tests"
    found = folder / f"device-{key}.so"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            made = Path(new, "device.so")
            flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib"]
            line = [_compiler() or "c++", *flags, str(SOURCE), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
            subprocess.run([*line, "-o", str(made)], check=True)
            made.replace(found)
    return found


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def replace_torch_cuda(on_wait: Callable[[str], None]) -> None:
    """Gives torch.cuda what a CPU build has not; `on_wait` is called with what the host waits for whenever it does."""
    import torch

    class Event:
        def __init__(self, *_: object, **__: object):
            pass

        def record(self, *_: object) -> None:
            pass

        def wait(self, *_: object) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            on_wait("an event")

    class Stream:
        def __init__(self, *_: object, **__: object):
            self.device, self.stream_id, self.device_index, self.device_type = torch.device("cuda", 0), 0, 0, 1

        def wait_stream(self, stream: object) -> None:
            pass

        def wait_event(self, event: object) -> None:
            pass

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            on_wait("a stream")

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    replaced = {
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device_count": lambda: DEVICES,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: on_wait("the device"),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "_lazy_init": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=85 * 10**9),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "default_generators": (torch.default_generator,) * DEVICES,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = replaced["get_rng_state"], lambda s, d=None: None
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.Tensor.record_stream = lambda self, s: None
