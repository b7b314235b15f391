"""The programs as functions: their results are the programs', mistakes are exceptions, the process stays as it was."""

import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.programs import run, summary
from support.tiny import TinyCorpus

import stablelm
from stablelm.config.load import dump
from stablelm.config.schema import Config
from stablelm.errors import ConfigError, DivergedError

MODEL = {"n_layers": 2, "d_model": 32, "n_heads": 2}
SMALL = {
    "model": MODEL,
    "observe": {"every": 1},
    "evaluate": {"every": 0, "batches": 1},
    "checkpoint": {"every": 0},
}


def configure(corpus: TinyCorpus, folder: Path, *, steps: int = 3, **sections) -> Config:
    data = {"seq_len": 32, "lanes": 4}
    train = {"steps": steps, "global_batch_size": 4, "warmup_steps": 1}
    given = {**SMALL, "data": data, "train": train, "run": {"dir": folder}, **sections}
    return stablelm.load_config(overrides=corpus.overrides(), **given)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def unchanged() -> Iterator[None]:
    """What a function may not leave behind in the process."""

    def state():
        handlers = [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        ]
        threads = {thread.name for thread in threading.enumerate()}
        environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        return handlers, torch.get_rng_state().tolist(), environ, list(warnings.filters), threads

    before = state()
    yield
    assert state() == before
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def run_dir(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    stablelm.train(configure(tiny_corpus, folder))
    return folder


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("kind", ["auto", "ddp", "fsdp2"])
def test_training_is_the_programs(tiny_corpus: TinyCorpus, run_dir: Path, tmp_path: Path, kind: str):
    config = configure(tiny_corpus, tmp_path / "one", engine={"kind": kind})
    result = stablelm.train(config)
    told = summary(tmp_path / "one")
    assert (result.exit_code, result.reason, result.step, result.tokens) == (0, "", 3, 3 * 4 * 32)
    assert (result.loss, result.val_loss, result.run_dir) == (told["loss"], told["val_loss"], tmp_path / "one")
    assert result.loss == pytest.approx(summary(run_dir)["loss"], rel=1e-6)
    assert stablelm.train(config) == result  # there is nothing to do
    assert summary(tmp_path / "one")["attempts"] == 2


@pytest.mark.usefixtures("unchanged")
def test_a_stopped_run_goes_on_in_the_same_process(tiny_corpus: TinyCorpus, run_dir: Path, tmp_path: Path):
    stop = configure(tiny_corpus, tmp_path / "run", run={"dir": tmp_path / "run", "stop_after": 2})
    result = stablelm.train(stop)
    assert (result.exit_code, result.reason, result.step) == (75, "run.stop_after", 2)
    on = replace(stop, run=replace(stop.run, stop_after=None))
    assert stablelm.train(on).loss == summary(run_dir)["loss"]
    with pytest.raises(ConfigError, match="which --resume none would overwrite"):
        stablelm.train(on, resume="none")


@pytest.mark.usefixtures("unchanged")
def test_another_thread_may_train(tiny_corpus: TinyCorpus, tmp_path: Path):
    found = []
    thread = threading.Thread(target=lambda: found.append(stablelm.train(configure(tiny_corpus, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert [result.step for result in found] == [3]


def interrupt(run_dir: Path, *pauses: float) -> threading.Thread:
    """Interrupts this process after each of the pauses (seconds), from the first record of a run on."""

    def work() -> None:
        records = run_dir / "metrics.jsonl"
        while not (records.exists() and records.stat().st_size):
            time.sleep(0.05)
        for pause in pauses:
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.usefixtures("unchanged")
def test_an_interrupt_stops_with_a_checkpoint(tiny_corpus: TinyCorpus, tmp_path: Path):
    sender = interrupt(tmp_path / "run", 0.0)
    result = stablelm.train(configure(tiny_corpus, tmp_path / "run", steps=100_000))
    sender.join()
    assert (result.exit_code, result.reason) == (75, "signal")
    assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:08d}").is_dir()


@pytest.mark.usefixtures("unchanged")
def test_a_second_interrupt_ends_a_step_that_does_not(tiny_corpus: TinyCorpus, tmp_path: Path):
    slow = {"allow": True, "slow": [0, 20.0]}
    run_dir = tmp_path / "run"
    config = configure(tiny_corpus, run_dir, steps=2)
    stablelm.train(replace(config, run=replace(config.run, stop_after=1)))
    sender = interrupt(run_dir, 3.0, 2.1)
    with pytest.raises(KeyboardInterrupt):
        stablelm.train(configure(tiny_corpus, run_dir, steps=2, faults=slow))
    sender.join()
    assert summary(run_dir)["reason"] == "second signal"


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [({"bad_batch": 2}, DivergedError, 76), ({"crash": [0, 2]}, RuntimeError, 1)],
)
def test_a_failure_is_an_exception_and_leaves_nothing(
    tiny_corpus: TinyCorpus, tmp_path: Path, fault: dict, kind: type[Exception], code: int
):
    sections = {"faults": {"allow": True, **fault}, "guards": {"max_skips": 0}}
    data = {"seq_len": 32, "lanes": 4, "workers": 2, "worker_kind": "process"}
    config = configure(tiny_corpus, tmp_path / "run", data=data, engine={"kind": "ddp"}, **sections)
    with pytest.raises(kind) as found:
        stablelm.train(config)
    told = summary(tmp_path / "run")
    assert (told["exit_code"], told["reason"]) == (code, str(found.value))


@pytest.mark.usefixtures("unchanged")
def test_mistakes_create_nothing(tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure(tiny_corpus, tmp_path / "run")
    wrong = replace(config, train=replace(config.train, steps="ten"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train\.steps=ten must be an integer or null \(config: train\.steps\)"):
        stablelm.train(wrong)
    with pytest.raises(ConfigError, match=r"a configuration is what load_config gives, not str"):
        stablelm.train("quickstart")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"engine\.kind=zero2 keeps state"):
        stablelm.train(configure(tiny_corpus, tmp_path / "run", engine={"kind": "zero2"}))
    for call in (stablelm.load_model, stablelm.evaluate, lambda run: stablelm.export(run, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"checkpoint=\$HOME/run holds a \$"):
            call("$HOME/run")
    with pytest.raises(ConfigError, match="evaluate has no argument text_colum;"):
        stablelm.evaluate("run", text_colum="text")
    with monkeypatch.context() as launcher:
        launcher.setenv("RANK", "0")
        launcher.setenv("WORLD_SIZE", "2")
        for call in (lambda: stablelm.train(config), lambda: stablelm.evaluate("run")):
            with pytest.raises(ConfigError, match="in one process, and torchrun started 2; use torchrun -m stablelm"):
                call()
    assert list(tmp_path.iterdir()) == []


def test_configurations_from_python(tmp_path: Path):
    as_words = ["train.lr=0.002", "model.method=magneto", f"run.dir={tmp_path}", "data.path=[a.json, b.json]"]
    one = stablelm.load_config("quickstart", overrides=as_words)
    data = {"path": ["a.json", "b.json"]}
    two = stablelm.load_config(
        "quickstart", run={"dir": tmp_path}, train={"lr": np.float64(0.002)}, data=data, **{"model.method": "magneto"}
    )
    assert one == two
    for rate in np.logspace(-3, -2, 3, dtype=np.float32):
        assert stablelm.load_config(train={"lr": rate}).train.lr == float(rate)
    with pytest.raises(ConfigError) as found:
        stablelm.load_config("quickstart", train={"stpes": 1, "lr": object()})
    kind, unknown = sorted(str(found.value).splitlines())
    assert unknown == "unknown key train.stpes, did you mean train.steps? (load_config: train.stpes)"
    assert kind.startswith("train.lr=<object object at ") and kind.endswith("must be a number (load_config: train.lr)")


def test_evaluation_is_the_programs(run_dir: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    out = tmp_path / "figures.json"
    named = {"more": tiny_corpus.train}
    done = run("eval", "--checkpoint", str(run_dir), "--data", f"more={named['more']}", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert stablelm.evaluate(run_dir, data=named) == json.loads(out.read_text())


def test_scores_are_those_of_the_softmax(run_dir: Path):
    """Beside a log-softmax of whole logits in float64, a window at a time; long texts need several windows."""
    model = stablelm.load_model(run_dir, precision="fp32")
    tokenizer = model.run.tokenizer
    texts = ["bato de ku", "", "to", " ".join(["ba to de ku"] * 12)]
    scores = stablelm.score(model, texts, batch_size=2)
    longest = model.config.model.max_seq_len
    assert longest is not None and scores[-1].tokens > 2 * longest
    for text, score in zip(texts, scores, strict=True):
        ids = [tokenizer.eos, *tokenizer.encode(text)]
        expected, half = 0.0, (longest + 1) // 2
        starts = range(1, len(ids), half) if len(ids) - 1 > longest else [1]
        for start in starts:
            end = min(start + half, len(ids)) if len(starts) > 1 else len(ids)
            window = torch.tensor([ids[max(0, end - longest - 1) : end]])
            if end > start:
                logits = model.module.logits(model.module(window[:, :-1])).double().log_softmax(-1)
                chosen = logits.gather(-1, window[:, 1:, None]).squeeze(-1)
                expected += float(chosen[0, -(end - start) :].sum())
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(text.encode()))
    first = scores[0]
    assert first.bits_per_byte == pytest.approx(-first.log_likelihood / math.log(2) / len(texts[0]))
    assert math.isnan(scores[1].bits_per_byte)


@pytest.mark.usefixtures("unchanged")
def test_probe_and_plan_are_the_programs(tiny_corpus: TinyCorpus, tmp_path: Path):
    config = configure(tiny_corpus, tmp_path / "run")
    found = stablelm.probe(config, sequences=1)
    written = tmp_path / "written"
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    done = run("probe", "--config", str(file), "--sequences", "1", "--out", str(written))
    assert done.returncode == 0, done.stderr
    told = json.loads((written / "probe.json").read_text())
    assert {**found, "seconds": 0} == {**told, "seconds": 0}
    out = tmp_path / "plan.json"
    done = run("plan", "--config", str(file), "--world-size", "2", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    planned = stablelm.plan(config, world_size=2, quick=True)
    assert {**planned, "seconds": 0} == {**json.loads(out.read_text()), "seconds": 0}
    own = {"peak_tflops": 100, "memory_gb": 40, "bandwidth": 1000}
    assert stablelm.plan(config, world_size=2, gpu="mine", figures=own, quick=True)["accelerator"] == "mine"
    with pytest.raises(ConfigError, match="--peak-flops does not describe an accelerator"):
        stablelm.plan(config, world_size=2, figures={"peak_flops": 100}, quick=True)
    assert not (tmp_path / "run").exists()


def test_exports(run_dir: Path, tmp_path: Path):
    done = stablelm.export(run_dir, tmp_path / "out", dtype="fp32")
    assert (done.folder, done.format) == (tmp_path / "out", "hf")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="is not empty; name a new directory"):
        stablelm.export(run_dir, tmp_path / "out")


def test_packages_of_the_functions_names_are_packages_still():
    import stablelm.train.loop as loop

    assert stablelm.train.loop is loop  # type: ignore[attr-defined]
    assert set(stablelm.__all__) <= set(dir(stablelm))
    assert all(callable(getattr(stablelm, name)) for name in stablelm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        stablelm.tarin  # type: ignore[attr-defined]  # noqa: B018
