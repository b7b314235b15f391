"""Compiled kernels of a run, kept in its directory for its next attempt, which may start on another machine.

Kernels are code, and a run directory may come from anybody. So the file is sealed (HMAC-SHA256) with a key that lies in
the user's home directory and in no run directory: what another user wrote, or came with a copied run, is not opened.
"""

import errno
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from stablelm.config.schema import Config
from stablelm.engine.process.environment import is_own
from stablelm.engine.ranks import Ranks
from stablelm.new_files import make_folder, replace_file
from stablelm.small_files import read_small

FOLDER = "compiled"
MOST = 1 << 30
SEAL_BYTES = KEY_BYTES = 32


class CompileCache:
    """The kernels of one rank, which those of the same number on other nodes share; none where nothing is compiled."""

    def __init__(self, config: Config, ranks: Ranks, message: Callable[[str], None]):
        """`config` is settled (`engine.process.compilation`)."""
        self._enabled, self._message = bool(config.train.compile), message
        self._writes = ranks.rank < max(1, ranks.world_size // ranks.nodes)
        name = f"{ranks.device.type}-{ranks.device.index or 0}-torch-{version('torch')}.bin"
        self._path = Path(os.path.realpath(config.run.dir)) / FOLDER / name
        self._kept = b""

    def load(self) -> None:
        """Gives torch the kernels of an earlier attempt; a line says so, or why they are not used."""
        if not self._enabled:
            return
        try:
            found = read_small(self._path, MOST)
            seal = self._seal(found[SEAL_BYTES:])
        except OSError:
            return
        if not hmac.compare_digest(found[:SEAL_BYTES], seal):
            self._message(f"{self._path} is damaged, or not written by this user in this folder: compiling again")
            return
        self._kept = found[SEAL_BYTES:]
        torch.compiler.load_cache_artifacts(self._kept)
        self._message(f"using the kernels that an earlier attempt compiled ({len(found) / 2**20:.1f} MiB)")

    def keep(self) -> None:
        """Writes what has been compiled since, if anything; without a word where that is not possible."""
        saved = torch.compiler.save_cache_artifacts() if self._enabled and self._writes else None
        if saved is None or saved[0] == self._kept or len(saved[0]) + SEAL_BYTES > MOST:
            return
        with suppress(OSError):
            make_folder(self._path.parent)
            replace_file(self._path, self._seal(saved[0]) + saved[0])
            self._kept = saved[0]

    def _seal(self, content: bytes) -> bytes:
        bound = os.fsencode(self._path) + b"\0"
        return hmac.digest(user_key(), bound + hashlib.sha256(content).digest(), "sha256")


def user_key() -> bytes:
    """This user's key, made where there is none. Raises OSError where the home directory takes none."""
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "stablelm" / "compiled.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):  # of several ranks the first one makes it
            os.link(temporary, path)
        temporary.unlink()
    if not is_own(path):
        raise PermissionError(errno.EPERM, "readable by others than its owner", str(path))
    return read_small(path, KEY_BYTES)
