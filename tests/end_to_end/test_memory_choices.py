"""Runs that choose their memory: the mode of auto on record, no mode that fits, and a resume with compact moments."""

from pathlib import Path

import yaml
from support.programs import TINY, losses, run
from support.tiny import TinyCorpus


def train(corpus: TinyCorpus, run_dir: Path, *extra: str):
    return run("pretrain", *TINY, *corpus.overrides(), "train.steps=6", f"run.dir={run_dir}", *extra)


def test_auto_is_recorded_and_changes_no_loss(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = train(tiny_corpus, tmp_path / "auto", "engine.recompute=auto", "engine.memory_limit=1e10")
    assert done.returncode == 0, done.stderr
    assert "engine.recompute=auto is none; predicted peak of a rank: none 0.0" in done.stdout
    asked, became = (
        yaml.safe_load((tmp_path / "auto" / name).read_text()) for name in ("config.yaml", "resolved.yaml")
    )
    assert (asked["engine"]["recompute"], became["engine"]["recompute"]) == ("auto", "none")
    assert train(tiny_corpus, tmp_path / "full", "engine.recompute=full").returncode == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "full")


def test_nothing_is_created_where_nothing_fits(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = train(tiny_corpus, tmp_path / "run", "engine.recompute=auto", "engine.memory_limit=1000")
    assert done.returncode == 78
    assert "engine.recompute=auto: the predicted peak of a rank is 0.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_with_less_optimizer_memory_resumes_exactly(tiny_corpus: TinyCorpus, tmp_path: Path):
    less = ("train.moments=bf16", "engine.optimizer_in_backward=true", "train.grad_clip=0", "observe.layers_every=2")
    whole = train(tiny_corpus, tmp_path / "whole", *less)
    assert whole.returncode == 0, whole.stderr
    stopped = train(tiny_corpus, tmp_path / "run", *less, "run.stop_after=3")
    assert stopped.returncode == 75, stopped.stderr
    changed = train(tiny_corpus, tmp_path / "run", "train.grad_clip=0")
    assert changed.returncode == 78
    assert "train.moments: saved with bf16, now fp32" in changed.stderr
    # engine.* is free: the ordinary update goes on from where the hooks stopped.
    resumed = train(tiny_corpus, tmp_path / "run", *(each for each in less if "backward" not in each))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
