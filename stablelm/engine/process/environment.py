"""Environment variables that torch and CUDA read once, when they start: to be set before. Imports no torch."""

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from stablelm.config.schema import Config

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The names of one setting, the newer first."""
COMPILED = "TORCHINDUCTOR_CACHE_DIR"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
RECORDED = (*ALLOCATOR, WORKSPACE, "CUDA_VISIBLE_DEVICES", "NCCL_ALGO", "NCCL_PROTO")


def set_variables(config: Config, environ: MutableMapping[str, str] = os.environ) -> None:
    """What a run on GPUs wants; a variable that the user has set stays as it is. CPUs read none of them."""
    if not any(name in environ for name in ALLOCATOR):
        # Segments that grow: activations of changing sizes (evaluation, layer measurements) leave no gaps.
        environ[ALLOCATOR[0]] = "expandable_segments:True"
    if config.train.deterministic:
        environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def variables_kept(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Puts back what `set_variables` and `own_compile_folder` set."""
    before = {name: environ.get(name) for name in (*ALLOCATOR, WORKSPACE, COMPILED)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value


def recorded(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that matter to a run on GPUs, for its provenance."""
    return {name: environ[name] for name in RECORDED if name in environ}


def in_words(environ: Mapping[str, str] = os.environ) -> str:
    """One line for the console."""
    return "environment: " + ", ".join(f"{name}={value}" for name, value in recorded(environ).items())


def own_compile_folder() -> None:
    """Has torch compile into a folder that only this user can write to; a folder that the user names is taken.

    torch's own choice is a known name in the folder for temporary files, which somebody else may have made first.
    """
    if COMPILED in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"stablelm-compiled-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    os.environ[COMPILED] = str(folder) if is_own(folder) else tempfile.mkdtemp(prefix="stablelm-compiled-")


def is_own(path: Path) -> bool:
    """Whether a file or folder, no link, belongs to this user, and others can neither read nor write it."""
    found = path.lstat()
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
