"""An imported model is a run to go on from: trained on by run.init_from, evaluated, and never resumed."""

import json
from pathlib import Path

import pytest
import torch
from support import public_models
from support.exported import logits
from support.programs import losses, run, summary
from support.tiny import TinyCorpus

from stablelm.evaluate.trained_run import load_module, open_run

TRAINING = ("train.global_batch_size=12", "data.seq_len=32", "data.lanes=12", "train.lr=1e-3", "train.warmup_steps=5")
QUICK = ("observe.every=1", "evaluate.every=0", "evaluate.batches=2", "checkpoint.every=0")


@pytest.fixture(scope="session")
def imported(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    folder = public_models.write_llama(root / "folder", tiny_corpus.tokenizer)
    done = run("import_model", "--from", str(folder), "--out", str(root / "run"), *TRAINING, *QUICK)
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_its_own_directory_is_not_resumed(imported: Path, tiny_corpus: TinyCorpus):
    before = sorted(path.name for path in imported.iterdir())
    arguments = ("--config", str(imported / "config.yaml"), *tiny_corpus.overrides(), "train.steps=3")
    done = run("pretrain", *arguments)
    assert done.returncode == 78
    assert f"run.init_from={imported} and another run.dir" in done.stderr
    assert sorted(path.name for path in imported.iterdir()) == before


def test_its_weights_are_verified(imported: Path):
    done = run("checkpoints", "verify", str(imported))
    assert done.returncode == 0 and "step-00000000    OK (weights of an imported model)" in done.stdout, done.stderr


def test_it_is_evaluated_as_any_run(imported: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = ("--data", tiny_corpus.validation, "--sequences", "8", "--out", str(tmp_path / "out.json"))
    done = run("eval", "--checkpoint", str(imported), *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["step"] == 0 and 4 < found["sets"]["data"]["loss"] < 8


def test_its_configuration_starts_a_run_from_its_weights(imported: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    data = [each for each in tiny_corpus.overrides() if "tokenizer" not in each]
    arguments = ("--config", str(imported / "config.yaml"), *data, f"run.dir={tmp_path / 'run'}")
    lacking = run("pretrain", *arguments)
    assert lacking.returncode == 78 and "train.steps and train.tokens are both missing" in lacking.stderr
    done = run("pretrain", *arguments, "train.steps=1", "train.lr=1e-12")
    assert done.returncode == 0, done.stderr
    start, after = load_module(open_run(str(imported))), load_module(open_run(str(tmp_path / "run")))
    torch.testing.assert_close(dict(after.named_parameters()), dict(start.named_parameters()), atol=1e-9, rtol=1e-6)
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == Path(tiny_corpus.tokenizer).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pre_ln", "deepscalelm_sigma"])
def test_ten_steps_under_fsdp2_learn_match_one_process_and_are_exported(
    method: str, tiny_corpus: TinyCorpus, tmp_path: Path
):
    import transformers

    model = public_models.make("llama", tiny_corpus.tokenizer)
    folder = public_models.save(model, tmp_path / "folder", tiny_corpus.tokenizer)
    source = tmp_path / "imported"
    done = run("import_model", "--from", str(folder), "--out", str(source), "--method", method, *TRAINING, *QUICK)
    assert done.returncode == 0, done.stderr
    data = [each for each in tiny_corpus.overrides() if "tokenizer" not in each]
    for processes in (1, 2):
        kind = "fsdp2" if processes == 2 else "single"
        keys = (f"run.dir={tmp_path / kind}", f"engine.kind={kind}", "train.steps=10")
        done = run("pretrain", "--config", str(source / "config.yaml"), *data, *keys, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "single"), losses(tmp_path / "fsdp2")
    assert max(abs(two[step] / one[step] - 1) for step in range(1, 11)) < 1e-5
    assert two[10] < two[1] - 0.3
    scored = run("eval", "--checkpoint", str(tmp_path / "fsdp2"), "--data", tiny_corpus.validation)
    assert scored.returncode == 0, scored.stderr
    assert summary(tmp_path / "fsdp2")["step"] == 10

    arguments = ("--checkpoint", str(tmp_path / "fsdp2"), "--out", str(tmp_path / "out"), "--dtype", "fp32")
    done = run("export", *arguments, "--format", "llama")
    assert done.returncode == 0, done.stderr
    trained = load_module(open_run(str(tmp_path / "fsdp2")))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model)
    ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = logits(trained, ids)
    torch.testing.assert_close(public_models.logits_of(again, ids), ours, atol=1e-4, rtol=0)
    assert (ours - public_models.logits_of(model, ids)).abs().max() > 0.1, "it was trained"
