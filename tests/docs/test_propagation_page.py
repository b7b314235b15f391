"""The command of docs/propagation.md, of two methods at a small shape."""

from pathlib import Path

from support.pages import DOCS, commands, run_command
from support.tiny import TinyCorpus


def test_the_command_makes_a_row_for_each_method(tiny_corpus: TinyCorpus, tmp_path: Path):
    (line,) = commands(DOCS / "propagation.md")
    small = {
        "--methods all": "--methods pre_ln,catformer",
        "24x256": "2x256",
        "c4-train.*.json.gz": str(tiny_corpus.train),
        "t5.model": str(tiny_corpus.tokenizer),
    }
    done = run_command(line, tmp_path, tiny_corpus, here=small)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "propagation.md").read_text()
    assert [row.split("|")[1:4] for row in table.splitlines()[2:]] == [
        [" `pre_ln` ", " 2x256 ", " 1 "],
        [" `catformer` ", " 2x256 ", " 1 "],
    ]
