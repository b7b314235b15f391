"""docs/profiling.md: its command runs, its example is a table of the program, its thresholds are those of the code."""

import re
from pathlib import Path

import pytest
from support.pages import DOCS, commands, run_command
from support.tiny import TinyCorpus

from stablelm.observe.profile import advice, parts

PAGE = DOCS / "profiling.md"
TEXT = PAGE.read_text(encoding="utf-8")


def of_example(name: str) -> list[list[str]]:
    """The rows below a heading of the example: name and figures."""
    example = TEXT.split("```\nprofile of ")[1].split("\n```")[0]
    rows = re.search(rf"^{name} .*\n((?:.+\n)+)", example, re.MULTILINE)
    assert rows is not None
    return [re.split(r" {2,}", line.strip()) for line in rows[1].splitlines()]


@pytest.mark.slow
def test_the_command_writes_the_files_that_the_page_names(tiny_corpus: TinyCorpus, tmp_path: Path):
    (line,) = commands(PAGE)
    done = run_command(line, tmp_path, tiny_corpus, "data.workers=0")
    assert done.returncode == 0, done.stderr
    for name in ("trace-rank0-steps-20-22.json", "table-rank0-steps-20-22.txt", "table-rank0-steps-20-22.json"):
        assert (tmp_path / "runs" / "profiled" / "profile" / name).is_file()
    assert "What to try:" in done.stdout


def test_the_example_is_a_table_of_the_program():
    rows = of_example("part of the step")
    assert {name for name, *_ in rows} <= set(parts.ORDER)
    shares = [float(share.rstrip("%")) for *_, share in rows]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(rows))
    times = [float(row[1]) for row in rows]
    step = re.search(r"cpu: ([\d.]+) ms a step", TEXT)
    assert step is not None and sum(times) == pytest.approx(float(step[1]), abs=0.2)
    assert len(of_example("operator")) == 12


@pytest.mark.parametrize(
    ("row", "threshold"),
    [
        ("data wait", advice.DATA_WAIT),
        ("communication", advice.EXCHANGE),
        ("GPU idle", advice.IDLE),
        ("norms and other", advice.SMALL_OPERATORS),
        ("optimizer", advice.UPDATE),
        ("head and loss", advice.HEAD),
        ("records, evaluation, saving", advice.BETWEEN),
        ("rate of matmuls, of the limit", advice.MATMUL_RATE),
        ("peak memory, of a GPU's", advice.MEMORY_FREE),
    ],
)
def test_the_thresholds_are_those_of_the_code(row: str, threshold: float):
    found = re.search(rf"^\| {re.escape(row)} \| (?:below )?(\d+)% \|", TEXT, re.MULTILINE)
    assert found is not None and int(found[1]) == round(100 * threshold)
