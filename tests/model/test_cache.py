"""With a cache the decoder computes what it computes on the whole sequence, at every position, for every method."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from plain_decoder import build, sample, small_config
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Method, Model, Position
from stablelm.methods.catalogue import METHODS
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder

END = 3
LENGTH = 22


def variant(**attention: Any) -> ModelConfig:
    model = small_config("pre_ln", kv_heads=2)
    return replace(model, attention=replace(model.attention, **attention))


VARIANTS = {
    "grouped": small_config("pre_ln", kv_heads=2, activation="swiglu", norm="rmsnorm"),
    "alibi": small_config("post_ln", kv_heads=1, position="alibi"),
    "no_positions": small_config("gpt2", position="none"),
    "capped": variant(logit_cap=5.0),
    "capped_alibi": variant(logit_cap=5.0, position="alibi"),
    "normalised": variant(qk_norm=True, value_residual=True),
    "low_rank": variant(low_rank=0.5),
    "documents": variant(document_end=END),
    "documents_learned": variant(document_end=END, position="learned"),
    "documents_alibi": variant(document_end=END, position="alibi", logit_cap=5.0),
    "espa_rope": small_config("e_spa", position="rope"),
    "espa_learned": small_config("e_spa", position="learned"),
    "espa_skips": small_config("e_spa_skips"),
    "uspa": small_config("u_spa"),
    "value_skip": small_config("value_skipinit"),
    "sub": small_config("pre_ln", placement="sub"),
    "embedding_norm": small_config("pre_ln", embedding_norm=True, tie_embeddings=True, bias=True),
}
CONFIGS = VARIANTS | {name: small_config(name) for name in METHODS}
SPLITS = [[LENGTH], [7, 1, 9, 5], [1] * LENGTH]


def text(config: ModelConfig, batch: int) -> Tensor:
    """Tokens with several ends of documents."""
    tokens = sample(config, batch, LENGTH)[0]
    if config.attention.document_end is not None:
        tokens[tokens % 5 == 0] = END
    return tokens


def in_pieces(decoder: Decoder, tokens: Tensor, sizes: list[int], **options: Any) -> Tensor:
    cache = KeyValueCache(decoder.config, len(tokens), **options)
    return torch.cat([decoder(piece, cache=cache) for piece in tokens.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pieces_give_the_hidden_states_of_the_whole(name: str):
    decoder = build(CONFIGS[name]).eval()
    tokens = text(CONFIGS[name], 2)
    whole = decoder(tokens)
    for sizes in SPLITS:
        torch.testing.assert_close(in_pieces(decoder, tokens, sizes), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_rows_of_unequal_length_do_not_see_each_other(name: str):
    """Prompts of 3, 9 and 6 tokens in one piece filled up with anything, then token by token, rows leaving."""
    config = CONFIGS[name]
    decoder = build(config, "fp64").eval()
    tokens, prompts = text(config, 3), [3, 9, 6]
    whole = [decoder(row[None])[0] for row in tokens]
    cache = KeyValueCache(config, 3)
    filled = torch.full((3, 9), END)
    for row, prompt in enumerate(prompts):
        filled[row, :prompt] = tokens[row, :prompt]
    found = decoder(filled, cache=cache)
    cache.keep(prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[row, :prompt], whole[row][:prompt], rtol=0, atol=1e-12)
    rows = [0, 1, 2]
    for _ in range(10):
        if cache.lengths[rows.index(1)] == 14:
            cache.select([2, 0])
            rows = [rows[2], rows[0]]
            break
        new = torch.stack([tokens[row, at] for row, at in zip(rows, cache.lengths, strict=True)])
        found = decoder(new[:, None], cache=cache)
        for place, (row, length) in enumerate(zip(rows, cache.lengths, strict=True)):
            torch.testing.assert_close(found[place, 0], whole[row][length - 1], rtol=0, atol=1e-12)
    assert rows == [2, 0]
    two = torch.stack([tokens[row, at : at + 4] for row, at in zip(rows, cache.lengths, strict=True)])
    starts = list(cache.lengths)
    found = decoder(two, cache=cache)
    for place, (row, at) in enumerate(zip(rows, starts, strict=True)):
        torch.testing.assert_close(found[place], whole[row][at : at + 4], rtol=0, atol=1e-12)


@torch.no_grad()
def test_logits_of_chosen_columns_are_those_of_the_head():
    decoder = build(small_config("deepscalelm_pre", tie_embeddings=True)).eval()
    tokens = sample(decoder.config, 2, LENGTH)[0]
    logits = decoder.logits(decoder(tokens))
    columns = torch.tensor([4, 20])
    torch.testing.assert_close(decoder(tokens, logits_at=columns), logits[[0, 1], columns])
    cache = KeyValueCache(decoder.config, 2)
    decoder(tokens[:, :10], cache=cache)
    found = decoder(tokens[:, 10:], cache=cache, logits_at=torch.tensor([1, 5]))
    torch.testing.assert_close(found, logits[[0, 1], [11, 15]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_room_that_is_reserved_or_grows_changes_nothing():
    decoder = build(small_config("pre_ln", max_seq_len=400, n_layers=1)).eval()
    tokens = sample(decoder.config, 2, 300)[0]
    grown = in_pieces(decoder, tokens, [50, 100, 1, 149])
    torch.testing.assert_close(grown, in_pieces(decoder, tokens, [50, 100, 1, 149], reserve=300), rtol=0, atol=0)
    torch.testing.assert_close(grown, decoder(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bf16_with_a_cache_stays_near_the_whole_sequence():
    decoder = build(small_config("pre_ln"), "bf16").eval()
    tokens = sample(decoder.config, 2, LENGTH)[0]
    whole = decoder(tokens).float()
    assert (in_pieces(decoder, tokens, [5, 1, 16]).float() - whole).norm() < 2e-2 * whole.norm()


@torch.no_grad()
def test_a_cache_can_forget_its_last_tokens():
    decoder = build(CONFIGS["documents"]).eval()
    tokens = text(CONFIGS["documents"], 2)
    cache = KeyValueCache(decoder.config, 2)
    decoder(tokens[:, :12], cache=cache)
    decoder(torch.full((2, 3), END), cache=cache)
    cache.keep([12, 12])
    found = decoder(tokens[:, 12:], cache=cache)
    torch.testing.assert_close(found, decoder(tokens)[:, 12:], rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Stretched(Position):
    """A table by import path whose rows depend on the length, so that nothing that was computed can be kept."""

    name: ClassVar[str] = "stretched"

    def tables(self, model: Model, seq_len: int, d_head: int, **where: Any) -> tuple[Tensor, ...]:
        share = torch.arange(seq_len, **where)[:, None, None] / seq_len
        return share.cos(), share.sin()

    def turn(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        return x * tables[0] + x.roll(1, -1) * tables[1]

    def cache_obstacle(self, model: Model) -> str:
        return "its positions are shares of the text's length"


@dataclass(frozen=True)
class Decaying(Position):
    """A bias and tables by import path, which answers nothing about a cache."""

    name: ClassVar[str] = "decaying"
    biases_logits: ClassVar[bool] = True

    def tables(self, model: Model, seq_len: int, d_head: int, **where: Any) -> tuple[Tensor, ...]:
        return torch.arange(1, seq_len + 1, **where)[:, None, None].log1p(), torch.zeros(seq_len, **where)

    def turn(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        return x * tables[0]

    def bias(self, model: Model, seq_len: int, **where: Any) -> Tensor:
        place = torch.arange(seq_len, **where)
        distance = (place[:, None] - place).expand(model.n_heads, -1, -1)
        return (-distance.sqrt()).masked_fill(distance < 0, -torch.inf)


STRETCHED = Method("stretched", "none", {"attention.position": "stretched"}, (Stretched(),))
DECAYING = Method("decaying", "none", {"attention.position": "decaying"}, (Decaying(),))


@torch.no_grad()
def test_positions_by_import_path_are_kept_without_a_word_about_it():
    decoder = build(small_config("test_cache:DECAYING"), "fp64").eval()  # its logits grow, and their errors in fp32
    tokens = text(decoder.config, 2)
    whole = decoder(tokens)
    for sizes in SPLITS:
        torch.testing.assert_close(in_pieces(decoder, tokens, sizes), whole, rtol=0, atol=1e-12)


def test_what_changes_with_the_length_has_no_cache_and_says_why():
    with pytest.raises(ValueError, match="its positions are shares of the text's length"):
        KeyValueCache(small_config("test_cache:STRETCHED"), 1)
