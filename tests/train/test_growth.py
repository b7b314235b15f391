"""A deeper run that begins with a shallower one's weights: its layers, what stays the same, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import resolved, save_run
from support.tiny import TinyCorpus

from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.model.decoder import Decoder
from stablelm.train.growth import grown_from, layers_from
from stablelm.train.prepare import check_run_dir

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
SIZES = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4")
DEEP = ("model.n_layers=5",)


def config(source: Path, tiny: TinyCorpus, *overrides: str) -> Config:
    return resolved(tiny.tokenizer, *SIZES, *DEEP, f"run.grow_from={source}", *overrides)


def grown(source: Path, tiny: TinyCorpus, *overrides: str) -> TorchEngine:
    found = config(source, tiny, *overrides)
    engine = TorchEngine(found, "single", SINGLE)
    grown_from(found.run, engine, found.model, SINGLE)
    return engine


def hidden(module: Decoder) -> torch.Tensor:
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module.eval()(tokens)


def test_orders():
    assert layers_from("stack", 2, 5) == [0, 1, 0, 1, 0]
    assert layers_from("repeat", 2, 5) == layers_from("zero", 2, 5) == [0, 0, 0, 1, 1]
    assert layers_from("zero", 3, 6) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.method=gpt2", "model.attention.position=rope"),
        ("model.method=peri_ln", "model.norm=rmsnorm"),
        ("model.method=value_residual", "model.activation=swiglu", "model.placement=sub"),
        ("model.method=rezero",),
        ("model.method=qk_norm",),
    ],
)
def test_branches_of_zero_keep_the_function(overrides, tmp_path: Path, tiny_corpus: TinyCorpus):
    source, decoder = save_run(tmp_path / "run", tiny_corpus.tokenizer, *SIZES, *overrides)
    engine = grown(source, tiny_corpus, *overrides)
    torch.testing.assert_close(hidden(engine.module), hidden(decoder), rtol=1e-5, atol=1e-5)
    # What is new learns at once: its last matrix, or the norm behind it, has a gradient.
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    engine.module.train()
    engine.backward(engine.loss(tokens[:, :-1], tokens[:, 1:].contiguous()).total, last=True)
    gradients = engine.gradients()
    for layer in (1, 2, 4):
        assert any(gradients[name].any() for name in gradients if name.startswith(f"layers.{layer}.feedforward."))


@pytest.mark.parametrize("growth", ["stack", "repeat"])
def test_copies_are_whole_and_the_optimizer_starts_anew(growth, tmp_path: Path, tiny_corpus: TinyCorpus):
    method = "model.method=sigma_reparam"
    source, decoder = save_run(tmp_path / "run", tiny_corpus.tokenizer, *SIZES, method)
    engine = grown(source, tiny_corpus, method, f"run.growth={growth}")
    there, here = decoder.state_dict(), engine.module.state_dict()
    for place, layer in enumerate(layers_from(growth, 2, 5)):
        for name in (name for name in here if name.startswith(f"layers.{place}.")):
            assert torch.equal(here[name], there[name.replace(f"layers.{place}.", f"layers.{layer}.", 1)]), name
    assert torch.equal(here["embedding.weight"], there["embedding.weight"])
    moments = [value for name, value in engine.tensors().items() if name.endswith("exp_avg")]
    assert moments and not any(value.any() for value in moments)


@pytest.mark.parametrize(
    ("saved", "asked", "words"),
    [
        ((), ("model.n_layers=2",), "use more, or run.init_from"),
        ((), ("model.norm=rmsnorm",), r"model\.norm \(layernorm there, rmsnorm here\)"),
        ((), ("model.attention.logit_cap=5",), r"model\.attention\.logit_cap \(0\.0 there, 5\.0 here\)"),
        (("model.method=post_ln",), ("model.method=post_ln",), "norms on the stream"),
        (("model.method=catformer",), ("model.method=catformer",), "other shapes at each depth"),
        (("model.method=sigma_reparam",), ("model.method=sigma_reparam",), "use run.growth=stack"),
        (("model.method=layernorm_scaling",), ("model.method=layernorm_scaling",), "scales norms by the depth"),
        (("model.method=completep",), ("model.method=completep",), "depends on the depth"),
        (("model.method=looped",), ("model.method=looped",), "its layers are shared"),
    ],
)
def test_what_cannot_grow_is_refused_with_the_reason(saved, asked, words, tmp_path: Path, tiny_corpus: TinyCorpus):
    source, _ = save_run(tmp_path / "run", tiny_corpus.tokenizer, *SIZES, *saved)
    with pytest.raises(ConfigError, match=words):
        grown(source, tiny_corpus, *asked)


def test_a_source_that_is_missing_or_named_twice(tmp_path: Path, tiny_corpus: TinyCorpus):
    inside = f"run.dir={tmp_path / 'run'}"
    with pytest.raises(ConfigError, match=r"run\.grow_from=.*nowhere does not exist"):
        check_run_dir(config(tmp_path / "nowhere", tiny_corpus, inside), {}, "auto")
    twice: Any = config(tmp_path, tiny_corpus, inside, f"run.init_from={tmp_path}")
    with pytest.raises(ConfigError, match="use one of them"):
        check_run_dir(twice, {}, "auto")


@pytest.mark.slow
def test_a_run_grows_trains_and_resumes(tmp_path: Path, tiny_corpus: TinyCorpus):
    from support.programs import TINY, run, summary

    first = run("pretrain", *TINY, f"run.dir={tmp_path / 'first'}", "model.n_layers=2", "train.steps=2")
    assert first.returncode == 0, first.stderr
    grow = (*TINY, f"run.dir={tmp_path / 'second'}", "model.n_layers=4", f"run.grow_from={tmp_path / 'first'}")
    stopped = run("pretrain", *grow, "train.steps=4", "train.schedule=constant", "run.stop_after=2")
    assert stopped.returncode == 75, stopped.stderr
    done = run("pretrain", *grow, "train.steps=4", "train.schedule=constant")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "second")["step"] == 4
