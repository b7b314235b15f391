"""The checker finds each kind of harm."""

import os
from pathlib import Path

import pytest
from hostile.checker import attempt


def script(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


HARMS = {
    "exit code 1": "import sys\nprint('no', file=sys.stderr)\nsys.exit(1)",
    "a traceback": "raise ValueError",
    "killed after": "import time\ntime.sleep(60)",
    "b was changed": "open('b', 'a').write('x')",
    "new was made": "open('new', 'w')",
    "a was removed": "import os\nos.remove('a')",
    "link was changed": "import os\nos.remove('link')\nos.symlink('b', 'link')",
    "control character '\\x1b'": "print('\\x1b[2J')",
    "no word of why": "import sys\nsys.exit(78)",
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("fresh", [False, True])
def test_harm_is_found(harm: str, fresh: bool, tmp_path: Path):
    watched = tmp_path / "watched"
    watched.mkdir()
    for name in ("a", "b"):
        (watched / name).write_text(name)
    (watched / "link").symlink_to("a")
    os.mkfifo(watched / "fifo")
    seconds = 1.0 if "killed" in harm else 10.0
    outcome = attempt(script(tmp_path, HARMS[harm]), watched=watched, seconds=seconds, fresh=fresh)
    assert any(harm in fault for fault in outcome.faults()), outcome


def test_memory_is_bounded_in_child_processes_too(tmp_path: Path):
    child = "x = b'x' * (1 << 30); import time; time.sleep(60)"
    eats = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    outcome = attempt(script(tmp_path, eats), watched=tmp_path, memory=900 << 20)
    assert outcome.code is None
    assert outcome.peak_bytes > 900 << 20
    assert outcome.seconds < 10


def test_what_is_its_own_may_change(tmp_path: Path):
    writes = script(tmp_path, "import os\nos.makedirs('own/below')\nopen('own/below/x', 'w').write('x')\nprint('done')")
    outcome = attempt(writes, watched=tmp_path, own=[tmp_path / "own"])
    assert outcome.faults() == []
    assert outcome.out == "done\n"
