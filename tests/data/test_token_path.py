"""The path of a token that the head of the loader draws is the one that calls take: forward only, at most ten files."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from support.httpserver import serve
from support.letters import LetterTokenizer, write_rows

import stablelm
from stablelm.config.schema import DataConfig
from stablelm.data import loader

PACKAGE = Path(stablelm.__file__).parent


def files_of(frame: FrameType | None) -> list[str]:
    """The files of the package in a stack, outermost first, each as often as the calls come back to it."""
    found: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and (not found or found[-1] != str(path.relative_to(PACKAGE))):
            found.append(str(path.relative_to(PACKAGE)))
        frame = frame.f_back
    return found[::-1]


def test_the_drawn_path_is_the_one_that_is_walked(tmp_path: Path):
    drawn = re.findall(r"^    ((?:train|data)/\S+\.py) ", loader.__doc__ or "", re.MULTILINE)
    assert drawn[0] == "train/loop.py"
    assert len(drawn) <= 10
    write_rows(tmp_path / "a.json.gz", [f"{n} " + "x" * (n * 7919 % 997) for n in range(500)])
    walked = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith("http_file.py") and frame.f_code.co_name == "_run":
            walked.append(files_of(frame))

    config = DataConfig(seq_len=64, lanes=2, workers=0, shuffle_block=4)
    with serve(tmp_path) as server:
        each = loader.Loader([f"{server.url}/a.json.gz"], LetterTokenizer(), config, seed=1, global_batch_size=2)
        sys.setprofile(note)
        try:
            each.next()
        finally:
            sys.setprofile(None)
            each.close()
    assert set().union(*walked) == set(drawn[1:])
    for files in walked:
        assert files == sorted(files, key=drawn.index), "no call goes back to an earlier file"
