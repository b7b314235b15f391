"""One process, DDP and FSDP2 train the same model: the same losses, whoever starts them."""

from pathlib import Path

import pytest
from support.programs import TINY, losses, run
from support.tiny import TinyCorpus

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
FSDP = "--use_fsdp --fsdp_version 2"
STARTED = [
    pytest.param("torchrun", 2, "ddp", id="torchrun-ddp-2"),
    pytest.param("torchrun", 4, "ddp", id="torchrun-ddp-4"),
    pytest.param(FSDP, 2, "auto", id="accelerate-fsdp-2"),
    pytest.param(FSDP, 4, "auto", id="accelerate-fsdp-4"),
]
pytestmark = pytest.mark.slow


def train(corpus: TinyCorpus, run_dir: Path, *extra: str, **how) -> dict[int, float]:
    done = run("pretrain", *TINY, *corpus.overrides(), f"run.dir={run_dir}", *extra, **how)
    assert done.returncode == 0, done.stderr
    kind = {"torchrun": "ddp", FSDP: "fsdp2", "": "single"}[how.get("launcher", "")]
    assert f"engine {kind} on {how.get('processes', 1)} process(es)" in done.stdout
    return losses(run_dir)


@pytest.fixture(scope="module")
def one_process(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    folder = tmp_path_factory.mktemp("single")
    return {
        precision: train(tiny_corpus, folder / precision, f"train.precision={precision}", "train.micro_batch_size=6")
        for precision in TOLERANCE
    }


@pytest.mark.parametrize(("launcher", "processes", "kind"), STARTED)
@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_losses_do_not_depend_on_engine_or_world_size(
    precision: str, launcher: str, processes: int, kind: str, one_process, tiny_corpus: TinyCorpus, tmp_path: Path
):
    found = train(
        tiny_corpus,
        tmp_path / "run",
        f"train.precision={precision}",
        f"engine.kind={kind}",
        "train.micro_batch_size=1",
        launcher=launcher,
        processes=processes,
    )
    expected = one_process[precision]
    assert sorted(found) == sorted(expected) == list(range(1, 21))
    assert expected[20] != expected[1]
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= TOLERANCE[precision]
