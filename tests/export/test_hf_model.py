"""Our modelling file for transformers computes what the decoder computes, with and without its cache."""

from typing import Any

import pytest
import torch
from hf_folders import load, moved_decoder, our_logits, write_folder

from stablelm.config.schema import AttentionConfig, ModelConfig
from stablelm.methods.attention_residuals import AttentionResidualsOptions
from stablelm.methods.catalogue import METHODS, apply_method, problems
from stablelm.methods.deepscalelm import DeepscaleOptions
from stablelm.methods.denseformer import DenseformerOptions
from stablelm.methods.hyper_connections import HyperConnectionsOptions
from stablelm.methods.muddformer import MuddformerOptions
from stablelm.methods.value_residual import ValueResidualOptions
from stablelm.model.decoder import Decoder

END = 7
SIZES: dict[str, Any] = {
    "n_layers": 6,
    "d_model": 32,
    "n_heads": 4,
    "kv_heads": 4,
    "max_seq_len": 32,
    "vocab_size": 96,
}


def model_of(method: str = "pre_ln", attention: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    asked = ModelConfig(method=method, attention=AttentionConfig(**(attention or {})), **SIZES | keys)
    model = apply_method(asked)
    assert problems(model) == []
    return model.axes.stream.sized(model)


CONFIGS = {name: model_of(name) for name in METHODS} | {
    "post_biases": model_of("post_ln", bias=True, tie_embeddings=True),
    "peri_capped": model_of("peri_ln", {"logit_cap": 3.0}, norm="rmsnorm", kv_heads=2, activation="swiglu"),
    "alibi": model_of("deepscalelm_pre", {"position": "alibi"}, tie_embeddings=True),
    "alibi_three_heads": model_of("gpt2", {"position": "alibi", "logit_cap": 5.0}, n_heads=3, kv_heads=1, d_model=36),
    "dyt": model_of("layernorm_scaling", norm="dyt", bias=True),
    "documents": model_of("gpt2", {"document_end": END}),
    "documents_alibi": model_of("pre_ln", {"position": "alibi", "document_end": END}, kv_heads=2),
    "low_rank_sigma": model_of("magneto_sigma", {"low_rank": 0.25, "qk_norm": True}, bias=True),
    "values_capped": model_of("value_residual", {"logit_cap": 2.0, "low_rank": 0.5}, kv_heads=1),
    "values_learned": model_of("value_residual", options=(ValueResidualOptions(learned=True),)),
    "dense_dilated": model_of("denseformer", options=(DenseformerOptions(dilation=2, period=2),), norm="dyt"),
    "dense_sigma": model_of("denseformer", reparam="sigma", activation="swiglu", norm="rmsnorm"),
    "catformer_documents": model_of("catformer", {"document_end": END, "position": "learned"}, tie_embeddings=True),
    "espa_rope": model_of("e_spa", {"position": "rope"}, placement="pre", kv_heads=2, activation="gelu"),
    "espa_skips": model_of("e_spa_skips", kv_heads=2),
    "shrinking_eps": model_of("deepscalelm_pre", norm_eps=0.01, options=(DeepscaleOptions(norm_eps="shrinking"),)),
    "hyper_static": model_of("hyper_connections", options=(HyperConnectionsOptions(expansion=3, dynamic=False),)),
    "mudd_static": model_of("muddformer", options=(MuddformerOptions(dynamic=False),), placement="pre_scaled"),
    "depth_blocks": model_of("attention_residuals", options=(AttentionResidualsOptions(block_size=3),)),
    "res_scale": model_of("normformer", stream="res_scale", norm="rmsnorm", bias=True, activation="swiglu"),
    "mix_sigma": model_of("mix_ln", reparam="sigma", kv_heads=2),
    "completep_tied": model_of("completep", tie_embeddings=True, d_model=64),
}


def some_tokens(batch: int = 2, length: int = 19, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, SIZES["vocab_size"], (batch, length), generator=generator)
    tokens[0, 5], tokens[-1, 11], tokens[-1, 12] = END, END, END
    return tokens


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    decoder = moved_decoder(CONFIGS[request.param])
    return decoder, load(write_folder(decoder, tmp_path_factory.mktemp("hf") / "model"))


@pytest.mark.parametrize("pair", CONFIGS, indirect=True)
def test_the_logits_are_ours(pair: tuple[Decoder, Any]):
    decoder, model = pair
    tokens = some_tokens()
    ours = our_logits(decoder, tokens)
    with torch.no_grad():
        theirs = model(tokens).logits
        later = model(tokens, logits_to_keep=1, use_cache=False).logits
    assert ours.std() > 0.01  # a comparison of nothing with nothing would pass too
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(later, ours[:, -1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pair", CONFIGS, indirect=True)
def test_cached_steps_are_the_full_pass(pair: tuple[Decoder, Any]):
    """Prompt, two tokens at once, then one at a time."""
    _, model = pair
    tokens = some_tokens()
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        state, found = None, []
        for part in tokens.split([6, 2, *[1] * 11], dim=1):
            step = model(part, past_key_values=state)
            state = step.past_key_values
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pair", CONFIGS, indirect=True)
def test_a_padded_batch_generates_as_its_rows_alone(pair: tuple[Decoder, Any]):
    """The same tokens, from the same logits."""
    _, model = pair
    lengths = (9, 4, 13)
    rows = [some_tokens(1, 13, seed)[:, -length:] for seed, length in enumerate(lengths)]

    def generated(tokens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        found = model.generate(tokens, **common, **options, return_dict_in_generate=True, output_logits=True)
        return found.sequences[:, -8:], torch.stack(found.logits, dim=1)

    alone = [generated(row) for row in rows]
    padded = torch.cat([torch.nn.functional.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    together = generated(padded, attention_mask=(padded != 0).long())
    assert torch.equal(together[0], torch.cat([tokens for tokens, _ in alone]))
    torch.testing.assert_close(together[1], torch.cat([logits for _, logits in alone]), rtol=0, atol=2e-5)
