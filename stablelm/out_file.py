"""The file that a program is asked for by --out: checked before the work, written after it."""

import os
from pathlib import Path

from stablelm.errors import ConfigError, StorageError


def check_out(out: str | Path | None) -> None:
    """ConfigError where no file can be written at this path; creates nothing."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--out {out} may not be written by this user; name a file that may")


def write_out(out: str | Path, text: str) -> None:
    """Raises StorageError."""
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--out {out} cannot be written ({error.strerror}); name a file that can") from None
