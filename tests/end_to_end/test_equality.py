"""Whoever starts a run and whatever shares its work: the same losses. Engines by themselves: tests/engine."""

from pathlib import Path

import pytest
from support.programs import TINY, losses, run
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
CONFIGS = REPOSITORY / "configs" / "accelerate"
STARTED = [
    pytest.param("torchrun", 2, "ddp", "fp64", id="torchrun-ddp"),
    pytest.param(f"--config_file {CONFIGS / 'fsdp2.yaml'}", 2, "fsdp2", "fp32", id="accelerate-fsdp2"),
    pytest.param(f"--config_file {CONFIGS / 'hsdp.yaml'}", 4, "hsdp", "fp64", id="accelerate-hsdp"),
    pytest.param(f"--config_file {CONFIGS / 'zero2.yaml'}", 2, "zero2", "fp32", id="accelerate-zero2"),
    pytest.param(f"--config_file {CONFIGS / 'zero3.yaml'}", 2, "zero3", "fp32", id="accelerate-zero3"),
]
pytestmark = pytest.mark.slow


def train(corpus: TinyCorpus, run_dir: Path, *extra: str, kind: str = "single", processes: int = 1, **how) -> dict:
    done = run("pretrain", *TINY, *corpus.overrides(), f"run.dir={run_dir}", *extra, processes=processes, **how)
    assert done.returncode == 0, done.stderr
    assert f"engine {kind} on {processes} process(es)" in done.stdout
    return losses(run_dir)


@pytest.fixture(scope="module")
def one_process(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    folder = tmp_path_factory.mktemp("single")
    return {
        precision: train(tiny_corpus, folder / precision, f"train.precision={precision}", "train.micro_batch_size=6")
        for precision in TOLERANCE
    }


@pytest.mark.parametrize(("launcher", "processes", "kind", "precision"), STARTED)
def test_losses_do_not_depend_on_who_starts_the_run(
    launcher: str, processes: int, kind: str, precision: str, one_process, tiny_corpus: TinyCorpus, tmp_path: Path
):
    asked = kind if launcher == "torchrun" else "auto"
    settings = (f"train.precision={precision}", f"engine.kind={asked}", "train.micro_batch_size=1")
    found = train(tiny_corpus, tmp_path / "run", *settings, kind=kind, launcher=launcher, processes=processes)
    expected = one_process[precision]
    assert sorted(found) == sorted(expected) == list(range(1, 21))
    assert expected[20] != expected[1]
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= TOLERANCE[precision]
