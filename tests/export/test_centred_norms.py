"""Pre-LN models with root-mean-square norms, and on a stream of one feature less: exact in float64."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_folders import load, moved_decoder, our_logits
from safetensors.torch import save_file
from support.exported import save_run
from support.tiny import TinyCorpus
from test_hf_model import model_of, some_tokens

from stablelm.checkpoint.format import save_tensors
from stablelm.errors import ConfigError
from stablelm.export.centred_norms import CentredNorms, check
from stablelm.export.hf_model import writer
from stablelm.export.weights import Weights
from stablelm.export.writer import ExportRequest, export
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise

CONFIGS = {
    "plain": model_of(),
    "tied_learned": model_of("gpt2", bias=False),
    "swiglu_grouped": model_of("pre_ln", {"qk_norm": True}, activation="swiglu", kv_heads=2),
    "low_rank": model_of("pre_ln", {"low_rank": 0.5}),
    "scaled": model_of("deepscalelm_pre", tie_embeddings=True),
    "by_depth": model_of("layernorm_scaling", norm="layernorm"),
    "rezero": model_of("rezero", placement="pre"),
    "looped": model_of("looped", bias=False),
}


def folder_of(decoder: Decoder, folder: Path, norm: str) -> Path:
    """As the export writes it, in float64."""
    save_tensors(folder / "tensors", {f"model.{name}": p.detach() for name, p in decoder.named_parameters()}, None)
    source: Any = SimpleNamespace(model=decoder.config, weights=Weights(folder))
    check(decoder.config, norm)
    made, out = CentredNorms(source, norm), folder / "out"
    out.mkdir()
    shutil.copy(writer.MODELLING_FILE, out)
    (out / "config.json").write_text(json.dumps(made.config() | {"dtype": "float64"}))
    tensors = {name: lazy.to(torch.float64) for name, lazy in made.tensors()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("norm", ["pre_rms", "crms"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_layer_norms(name: str, norm: str, tmp_path: Path):
    decoder = moved_decoder(CONFIGS[name], "fp64")
    model = load(folder_of(decoder, tmp_path, norm)).double()
    tokens = some_tokens()
    with torch.no_grad():
        found = model(tokens).logits
    wanted = our_logits(decoder, tokens)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    width = CONFIGS[name].d_model - (norm == "crms")
    assert model.model.embedding.weight.shape[1] == width
    table = model.model.embedding.weight.detach()
    if norm == "pre_rms":
        torch.testing.assert_close(table.mean(dim=1), torch.zeros(len(table)).double(), rtol=0, atol=1e-15)


def test_biases_stay_with_root_mean_square_norms(tmp_path: Path):
    decoder = moved_decoder(model_of("gpt2"), "fp64")
    model = load(folder_of(decoder, tmp_path, "pre_rms")).double()
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, our_logits(decoder, tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "norm", "words"),
    [
        (model_of(norm="rmsnorm"), "pre_rms", "is no layer norm"),
        (model_of("post_ln"), "crms", "leaves out norms"),
        (model_of("peri_ln"), "pre_rms", "has other norms"),
        (model_of("magneto"), "pre_rms", "has other norms"),
        (model_of("denseformer"), "pre_rms", "not a sum of a skip and a branch"),
        (model_of("gpt2"), "crms", "bias of its final norm"),
    ],
)
def test_what_has_no_equivalent_is_refused(model, norm, words):
    with pytest.raises(ConfigError, match=words):
        check(model, norm)


@pytest.mark.parametrize("norm", ["pre_rms", "crms"])
def test_the_command_writes_it(norm: str, tmp_path: Path, tiny_corpus: TinyCorpus):
    sizes = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.method=looped")
    run, decoder = save_run(tmp_path / "run", tiny_corpus.tokenizer, *sizes)
    done = export(ExportRequest(str(run), tmp_path / "out", dtype="fp32", norm=norm))
    assert done.format == "hf"
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(found, our_logits(decoder, tokens), rtol=0, atol=1e-4)
    for other in ("gpt2", *(("llama",) if norm == "crms" else ())):
        with pytest.raises(ConfigError, match=f"--norm {norm} is not in --format {other}"):
            export(ExportRequest(str(run), tmp_path / "other", format=other, norm=norm))


def test_crmsnorm_is_layernorm_of_a_vector_with_one_feature_more():
    config = model_of(norm="crmsnorm")
    decoder = Decoder(config, "fp64")
    norm: Any = decoder.norm_final
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    found = norm(x)
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)
    wanted = torch.nn.functional.layer_norm(whole, (33,), eps=config.norm_eps)[:, :-1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    pull = torch.randn(5, 32, dtype=torch.float64)
    gradients = [torch.autograd.grad(each, x, pull, retain_graph=True)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_crmsnorm_starts_with_columns_that_nearly_sum_to_zero():
    decoder = moved_decoder(model_of(norm="crmsnorm", d_model=64))
    initialise(decoder, decoder.config, 0)
    table = decoder.embedding.weight.detach()
    one = table.var()
    assert float(table.sum(dim=1).var()) == pytest.approx(float(one), rel=0.4)  # and not 64 times that
