"""What users do with a folder of the format `hf`: deep models, fine-tuning, other caches, saving, other Pythons."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hf_folders import load, moved_decoder, our_logits, write_folder
from test_hf_model import CONFIGS, SIZES, model_of, some_tokens
from torch import Tensor

from stablelm.export.hf_model import writer
from stablelm.methods.axes import Method, Model, Stream
from stablelm.methods.catalogue import METHODS

GENERAL = ("documents", "dense_sigma", "espa_rope", "catformer", "values_capped", "alibi", "gpt2")
"""Together they have every mechanism."""


@dataclass(frozen=True)
class Halved(Stream):
    """A sum with gains of its own."""

    name: ClassVar[str] = "halved"

    def gains(self, model: Model) -> tuple[float, float]:
        return 0.5, 2.0


@dataclass(frozen=True)
class Averaged(Stream):
    """What no setting of the modelling file says."""

    name: ClassVar[str] = "averaged"

    def read(self, chunks: tuple[Tensor, ...], added: Mapping[str, Tensor]) -> Tensor:
        return chunks[0].cumsum(dim=1)


HALVED = Method("halved", "none", {"stream": "halved"}, (Halved(),))
AVERAGED = Method("averaged", "none", {"stream": "averaged"}, (Averaged(),))


def folder_of(name: str, tmp_path: Path, **options: Any) -> Path:
    return write_folder(moved_decoder(CONFIGS[name]), tmp_path / "model", **options)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "deepscalelm_sigma")) for name in METHODS]
)
def test_48_layers_give_our_logits(method: str, tmp_path: Path):
    decoder = moved_decoder(model_of(method, n_layers=48, activation="swiglu" if method == "completep" else None))
    tokens = some_tokens()
    with torch.no_grad():
        theirs = load(write_folder(decoder, tmp_path / "model"))(tokens).logits
    ours = our_logits(decoder, tokens)
    assert ours.isfinite().all()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("catformer", "denseformer", "rezero", "value_residual", "deepnorm", "documents"),
        *("keel", "layerscale", "admin", "res_scale", "resi_dual"),
    ],
)
def test_loss_and_gradients_are_ours(name: str, checkpointed: bool, tmp_path: Path):
    decoder = moved_decoder(CONFIGS[name])
    model = load(write_folder(decoder, tmp_path / "model")).train()
    if checkpointed:
        # Its former name, which versions from 6 on no longer have.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    tokens = some_tokens()
    labels = tokens.clone()
    labels[0, :4] = -100
    sums = decoder(tokens[:, :-1], labels[:, 1:])
    (sums.total / sums.valid).backward()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, sums.total / sums.valid, rtol=0, atol=1e-5)
    theirs = {name.removeprefix("model."): each.grad for name, each in model.named_parameters()}
    for parameter, each in decoder.named_parameters():
        assert theirs[parameter] is not None
        torch.testing.assert_close(theirs[parameter], each.grad, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize(
    ("search", "cache"),
    [
        ({}, {"cache_implementation": "static"}),
        ({}, {"use_cache": False}),
        ({"num_beams": 3}, {"use_cache": False}),
        ({"do_sample": True}, {"use_cache": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", GENERAL)
def test_a_cache_changes_nothing_of_what_is_generated(
    name: str, search: dict[str, Any], cache: dict[str, Any], tmp_path: Path
):
    """Of rows of which one is padded, beside the cache that grows."""
    model, tokens = load(folder_of(name, tmp_path)), some_tokens()[:, :9]
    tokens[1, :3] = 0
    options = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 7, "pad_token_id": 0, "do_sample": False}
    torch.manual_seed(0)
    found = model.generate(tokens, **options | search | cache)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(tokens, **options | search))


def test_prompts_are_looked_up_and_rejected_drafts_leave_the_cache(tmp_path: Path):
    """Speculative decoding, which crops the cache."""
    model = load(folder_of("documents", tmp_path))
    tokens = some_tokens()[:1, :12]
    options = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 95, "do_sample": False}
    found = model.generate(tokens, prompt_lookup_num_tokens=3, **options)
    # Some versions make one token too many of drafts that are accepted as a whole.
    assert torch.equal(found[:, : 12 + 9], model.generate(tokens, **options))


@pytest.mark.parametrize("name", GENERAL)
def test_padding_and_whole_masks_leave_the_logits_alone(name: str, tmp_path: Path):
    model, tokens = load(folder_of(name, tmp_path)), some_tokens()
    length = tokens.shape[1]
    pad = torch.zeros_like(tokens[:, :4])
    seen = torch.cat((torch.ones_like(tokens), pad), dim=1)
    square = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        plain = model(tokens).logits
        right = model(torch.cat((tokens, pad), dim=1), attention_mask=seen).logits[:, :length]
        left = model(torch.cat((pad, tokens), dim=1), attention_mask=seen.flip(1)).logits[:, 4:]
        whole = model(tokens, attention_mask=square).logits
        added = model(tokens, attention_mask=torch.zeros(square.shape).masked_fill(~square, -1e30)).logits
    for other in (right, left, whole, added):
        torch.testing.assert_close(other, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", GENERAL)
def test_saved_again_it_is_the_same(name: str, tmp_path: Path):
    model = load(folder_of(name, tmp_path))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / writer.MODELLING_FILE.name).read_bytes() == writer.MODELLING_FILE.read_bytes()
    again, tokens = load(tmp_path / "again"), some_tokens()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["peri_capped", "gpt2", "catformer", "e_spa"])
def test_it_runs_in_bf16(name: str, tmp_path: Path):
    """The stream stays in fp32, so the logits stay near those of fp32."""
    decoder = moved_decoder(CONFIGS[name])
    model = load(write_folder(decoder, tmp_path / "model", dtype=torch.bfloat16))
    tokens = some_tokens()
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    assert {each.dtype for each in output.hidden_states} == {torch.float32}
    ours = our_logits(decoder, tokens)
    assert (output.logits - ours).std() < 0.05 * ours.std()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 22)
    wide = load(tmp_path / "model", dtype=torch.float32)
    assert {each.dtype for each in wide.parameters()} == {torch.float32}


def test_attention_weights_are_those_that_average(tmp_path: Path):
    tokens, folder = some_tokens(), folder_of("alibi", tmp_path)
    with torch.no_grad():
        eager = load(folder, attn_implementation="eager")(tokens, output_attentions=True)
        fused = load(folder)(tokens)
    torch.testing.assert_close(eager.logits, fused.logits, rtol=0, atol=1e-4)
    assert len(eager.attentions) == SIZES["n_layers"]
    for weights in eager.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 19))
        assert not weights.triu(1).any()


def test_embeddings_may_be_given_in_place_of_tokens(tmp_path: Path):
    model, tokens = load(folder_of("gpt2", tmp_path)), some_tokens()
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)


def test_a_fresh_model_of_the_configuration_starts_finite(tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder_of("dyt", tmp_path), trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    logits = model(some_tokens()).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert (model.state_dict()["model.norm_final.alpha"] == 0.5).all()


WITHOUT_STABLELM = """
import sys
sys.modules["stablelm"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(8, 20)[None]
print(*model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist())
torch.save(model(tokens).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_it_needs_no_stablelm(tmp_path: Path):
    decoder = moved_decoder(CONFIGS["catformer_sigma"])
    folder, logits = write_folder(decoder, tmp_path / "model"), tmp_path / "logits"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_STABLELM, str(folder), str(logits)],
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(8, 20)[None]
    torch.testing.assert_close(torch.load(logits), our_logits(decoder, tokens), rtol=0, atol=1e-4)
    generated = [int(token) for token in done.stdout.split()]
    for length in range(12, 18):  # greedy by our own logits
        best = our_logits(decoder, torch.tensor([generated[:length]]))[0, -1].argmax()
        assert generated[length] == best


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("pre_ln", {}, "exactly one of input_ids and inputs_embeds"),
        ("pre_ln", {"input_ids": (1, 6), "attention_mask": (1, 5)}, r"attention_mask of shape \(1, 5\)"),
        ("gpt2", {"input_ids": (1, 33)}, "longer than the 32 positions"),
        ("documents", {"inputs_embeds": (1, 4, 32)}, "give input_ids"),
    ],
)
def test_wrong_calls_are_refused(name: str, given: dict[str, tuple[int, ...]], message: str, tmp_path: Path):
    model = load(folder_of(name, tmp_path))
    made = {
        key: torch.ones(shape, dtype=torch.float if len(shape) == 3 else torch.long) for key, shape in given.items()
    }
    with pytest.raises(ValueError, match=message):
        model(**made)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_is_one_that_the_modelling_file_reads(name: str):
    """transformers keeps settings that no class knows without a word."""
    from stablelm.export.hf_model.modeling_stablelm import DEFAULTS

    source: Any = SimpleNamespace(model=CONFIGS[name])
    assert writer.config(source).keys() <= DEFAULTS.keys() | {"architectures", "auto_map", "model_type"}


def test_a_stream_of_another_package_is_written_if_it_is_a_sum(tmp_path: Path):
    decoder = moved_decoder(model_of("test_hf_uses:HALVED"))
    tokens = some_tokens()
    with torch.no_grad():
        theirs = load(write_folder(decoder, tmp_path / "model"))(tokens).logits
    torch.testing.assert_close(theirs, our_logits(decoder, tokens), rtol=0, atol=1e-4)


def test_what_the_modelling_file_does_not_know_is_named():
    source: Any = SimpleNamespace(model=model_of("test_hf_uses:AVERAGED"))
    (obstacle,) = writer.obstacles(source)
    assert "model.stream=averaged" in obstacle
    assert "is not a sum of a skip and a branch" in obstacle
    known: Any = SimpleNamespace(model=CONFIGS["pre_ln"])
    assert writer.obstacles(known) == []
