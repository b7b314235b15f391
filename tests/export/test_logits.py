"""An exported model gives our logits in transformers, at 48 layers, with every weight away from its start."""

from pathlib import Path

import pytest
import torch
from support.exported import logits, save_run
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.evaluate.trained_run import load_module, open_run
from stablelm.export.folding import Folded
from stablelm.export.formats.choice import STANDARD, choose
from stablelm.export.weights import Weights
from stablelm.export.writer import ExportRequest, export

transformers = pytest.importorskip("transformers")

DEEP, SHALLOW = ("model.n_layers=48",), ("model.n_layers=6",)
GPT2 = ("model.d_model=64", "model.n_heads=4")
LLAMA = (*GPT2, "model.kv_heads=2", "model.norm=rmsnorm", "model.activation=swiglu")
TIED = "model.tie_embeddings=true"
METHODS = ("pre_ln", "deepscalelm_pre", "sigma_reparam", "deepscalelm_sigma", "layernorm_scaling", "completep")
CASES = {
    **{f"llama-{method}": ("llama", *DEEP, *LLAMA, f"model.method={method}") for method in METHODS},
    "qwen3": ("qwen3", *DEEP, *LLAMA, "model.method=completep", "model.attention.qk_norm=true"),
    "gemma2": ("gemma2", *DEEP, *LLAMA, "model.method=peri_ln", "model.attention.logit_cap=20"),
    "gpt2": ("gpt2", *DEEP, *GPT2, "model.method=gpt2"),
    "llama-scaled-tied": ("llama", *SHALLOW, *LLAMA, "model.method=deepscalelm_sigma", TIED),
    "llama-low-rank-maps": ("llama", *SHALLOW, *LLAMA, "model.method=mlra", "model.reparam=sigma"),
    "llama-rezero": ("llama", *SHALLOW, *LLAMA, "model.method=rezero", "model.placement=pre"),
    "llama-tied-multiplier": ("llama", *SHALLOW, *LLAMA, "model.method=completep", TIED),
    "llama-biases": ("llama", *SHALLOW, *LLAMA, "model.method=sigma_reparam", "model.bias=true"),
    "llama-wesar": ("llama", *SHALLOW, *LLAMA, "model.method=wesar"),
    "llama-scaled-embeddings": ("llama", *SHALLOW, *LLAMA, "model.method=scaled_embed"),
    "llama-norm-on-embeddings": ("llama", *SHALLOW, *LLAMA, "model.embedding_norm=true", TIED),
    "llama-layernorm": ("llama", *SHALLOW, *LLAMA, "model.norm=layernorm", "model.method=deepscalelm_pre", TIED),
    "qwen3-scaled": ("qwen3", *SHALLOW, *LLAMA, "model.method=deepscalelm_pre", "model.attention.qk_norm=true"),
    "gemma2-tied-scaled": ("gemma2", *SHALLOW, *LLAMA, "model.placement=peri", "model.method=deepscalelm_pre", TIED),
    "gpt2-scaled": ("gpt2", *SHALLOW, *GPT2, "model.method=deepscalelm_pre", "model.attention.position=learned", TIED),
    "gpt2-without-positions": ("gpt2", *SHALLOW, *GPT2, "model.activation=relu", "model.attention.position=none"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_ours(case: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    expected, *overrides = CASES[case]
    run, _ = save_run(tmp_path / "run", tiny_corpus.tokenizer, *overrides)
    done = export(ExportRequest(str(run), tmp_path / "out", dtype="fp32", checked=tiny_corpus.validation))
    assert done.format == expected
    exported, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    ours = load_module(open_run(str(run)))
    tokens = torch.randint(ours.config.vocab_size or 0, (3, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = exported.eval()(tokens).logits
    wanted = logits(ours, tokens)
    assert wanted.std() > 0.1
    assert (theirs - wanted).abs().max() < 1e-4


def test_what_needs_no_fold_is_equal_to_the_last_bit(tiny_corpus: TinyCorpus, tmp_path: Path):
    from safetensors.torch import load_file

    sizes = ("model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.norm=rmsnorm", "model.activation=swiglu")
    run, ours = save_run(tmp_path / "run", tiny_corpus.tokenizer, *sizes, "model.init=fan_in")
    export(ExportRequest(str(run), tmp_path / "out", dtype="fp32"))
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(p.numel() for p in ours.parameters())
    body = ours.layers[1].attention.body  # type: ignore[union-attr]
    assert torch.equal(theirs["model.layers.1.self_attn.q_proj.weight"], body.query.weight)  # type: ignore[union-attr]
    assert torch.equal(theirs["model.embed_tokens.weight"], ours.embedding.weight)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.method=catformer",), "concatenation"),
        (("model.method=denseformer",), "weighted sums"),
        (("model.method=value_residual",), "first layer's"),
        (("model.method=magneto",), "model.placement=sub"),
        (("model.method=deepnorm",), "model.placement=post"),
        (("model.method=e_spa",), "no skips"),
        (("model.method=rezero",), "model.placement=none"),
        (("model.norm=dyt",), "model.norm=dyt"),
        (("model.attention.position=alibi",), "model.attention.position=alibi"),
        (("model.embedding_norm=true", "model.attention.position=learned"), "model.embedding_norm"),
    ],
)
def test_what_no_architecture_computes_is_refused_by_name(
    overrides: tuple[str, ...], words: str, tiny_corpus: TinyCorpus, tmp_path: Path
):
    sizes = ("model.n_layers=4", "model.d_model=32", "model.n_heads=2")
    run, _ = save_run(tmp_path / "run", tiny_corpus.tokenizer, *sizes, *overrides)
    opened = open_run(str(run))
    folded = Folded(opened.config.model, Weights(opened.checkpoint))
    for name in STANDARD:
        with pytest.raises(ConfigError, match=f"--format {name} .*{words}"):
            choose(name, folded)
