"""The check of phrases finds them where a user reads them, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("phrases.py")

PYTHON = '''"""A module that is told nothing."""
LIMIT = 3
"""What a whole number stands in for."""


def read(count):  # a whole number
    """Counts what is gone."""
    if count > LIMIT:
        raise ValueError(f"count={count} is no number of rows; "
                         "give a whole number")
    log.info("data.text_column=%s", count)
    print("the file is "
          "gone")
'''
HELP = '"""Trains so many steps.\n\nTwo steps left.\n"""\nprint(__doc__)\n'
SHELL = "# the mend is said here\necho 'the mend: run it again'\n"
PAGE = """# A page
It asks for a whole
number; `a whole number` and `is_gone` are names. There is no file.

```
the run is gone
```
"""


def run(*files: Path) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("messages.py", PYTHON, ['9: "is no number"', '10: "whole number"', '12: "is gone"']),
        ("help.py", HELP, ['1: "so many steps"', '3: "steps left"']),
        ("job.sh", SHELL, ['2: "the mend"']),
        ("page.md", PAGE, ['2: "whole number"', '6: "is gone"']),
    ],
)  # fmt: skip
def test_a_phrase_is_found_on_its_line(tmp_path, name, text, expected):
    file = tmp_path / name
    file.write_text(text)
    code, lines = run(file)
    assert code == 1
    assert [line.removeprefix(f"{file}:").partition(": write ")[0] for line in lines] == expected
    assert all(line.endswith('"') and ': write "' in line for line in lines)


def test_plain_text_passes(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("`data.lanes` must be divisible by the number of ranks; set an integer in `data.text_column`.\n")
    assert run(file) == (0, [])
