"""The commands of docs/importing.md, one after the other, on a small LLaMA."""

import re
from pathlib import Path

import yaml
from support import public_models
from support.pages import DOCS, commands, run_command
from support.programs import summary
from support.tiny import TinyCorpus

LINES = commands(DOCS / "importing.md")


def test_the_page_runs_from_top_to_bottom(tiny_corpus: TinyCorpus, tmp_path: Path):
    public_models.write_llama(tmp_path / "llama", tiny_corpus.tokenizer)
    (tmp_path / "news.txt").write_text("ban der fi gosta. " * 40)
    here = {"/models/llama": str(tmp_path / "llama"), "/data/mine/*.json.gz": tiny_corpus.train}
    here["data.seq_len=1024"] = "data.seq_len=32"
    for line in LINES:
        done = run_command(line, tmp_path, tiny_corpus, "train.steps=3", here=here)
        assert done.returncode == 0, (line, done.stderr)
        if "launch/eval.py" in line:
            assert re.search(r"data: loss .* perplexity ", done.stdout)
    assert summary(tmp_path / "runs" / "continued")["step"] == 3
    deep = yaml.safe_load((tmp_path / "runs" / "imported_deep" / "config.yaml").read_text())
    assert deep["model"]["method"] == "deepscalelm_pre"


def test_the_page_imports_trains_and_evaluates():
    programs = [line.split()[1].removeprefix("launch/") for line in LINES]
    assert programs == ["import_model.py", "pretrain.py", "eval.py", "import_model.py"]
