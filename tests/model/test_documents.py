"""With document masking a row of several documents is what each document would be by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_decoder import build, small_config
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.model.attention import documents
from stablelm.model.attention.attention_kernels import choose, gpu_of

END = 1
ROW = [5, 9, END, 7, 3, 8, END, END, 4, 6, 2]
DOCUMENTS = [slice(0, 3), slice(3, 7), slice(7, 8), slice(8, 11)]


def within(config: ModelConfig, **attention: Any) -> ModelConfig:
    return replace(config, attention=replace(config.attention, document_end=END, **attention))


CONFIGS = {
    "rope": within(small_config("pre_ln", kv_heads=2)),
    "learned": within(small_config("gpt2")),
    "alibi": within(small_config("pre_ln", position="alibi", kv_heads=2)),
    "none": within(small_config("pre_ln", position="none")),
    "capped": within(small_config("pre_ln"), logit_cap=5.0),
    "capped alibi": within(small_config("pre_ln", position="alibi"), logit_cap=5.0),
    "catformer": within(small_config("catformer")),
    "value_residual": within(small_config("value_residual")),
    "deepscalelm_sigma": within(small_config("deepscalelm_sigma")),
}


def rows() -> Tensor:
    """Two rows whose documents differ in length."""
    return torch.tensor([ROW, [*ROW[4:], *ROW[:4]]])


def test_places_bias_and_boundaries():
    tokens = torch.tensor([ROW])
    assert documents.places(tokens, END).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2]]
    numbers = documents.numbers(tokens, END)
    assert numbers.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4]]
    found = documents.boundaries(rows(), END).tolist()
    assert found[:9] == [0, 3, 7, 8, 11, 14, 15, 21, 22]
    assert set(found[9:]) <= {22}
    seen = documents.bias(numbers, dtype=torch.float32)[0, 0] == 0
    for query in range(len(ROW)):
        (own,) = (part for part in DOCUMENTS if part.start <= query < part.stop)
        assert seen[query].nonzero().flatten().tolist() == list(range(own.start, query + 1))


def test_the_number_of_boundaries_depends_on_the_size_of_a_batch_alone():
    """Unless documents are shorter than 64 tokens on average: then it is larger, and every boundary is there."""
    counts = {len(documents.boundaries(text_of(documents_in_row), END)) for documents_in_row in (1, 2, 7, 15)}
    assert counts == {4 * 1024 // 64 + 1}
    many = documents.boundaries(text_of(200), END)
    assert len(many) > len(many.unique()) == 4 * 201 + 1
    assert many[-1] == 4 * 1024


def text_of(ends: int) -> Tensor:
    """(4, 1024) with that many ends of documents in each row, none in the last place."""
    tokens = torch.full((4, 1024), 5)
    tokens[:, 1 : 5 * ends : 5] = END
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_documents_is_each_by_itself(name: str):
    decoder = build(CONFIGS[name], "fp64")
    found = decoder(rows())
    for part in DOCUMENTS:
        alone = decoder(rows()[:1, part])
        torch.testing.assert_close(found[:1, part], alone, rtol=1e-9, atol=1e-10)
    crossing = build(replace(CONFIGS[name], attention=replace(CONFIGS[name].attention, document_end=None)), "fp64")
    assert (crossing(rows())[:, -1] - found[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_gradients_are_those_of_each_by_itself(name: str):
    decoder = build(CONFIGS[name], "fp64")
    decoder(rows()[:1]).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    for part in DOCUMENTS:
        decoder(rows()[:1, part]).square().sum().backward()
    for parameter_name, parameter in decoder.named_parameters():
        if parameter_name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[parameter_name], rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_for_unequal_lengths_gives_what_the_mask_gives(kv_heads: int):
    config = within(small_config("pre_ln", kv_heads=kv_heads, d_model=128))
    device = torch.device("cuda")
    if choose(config, torch.bfloat16, gpu_of(device)) != "varlen":
        pytest.skip("this GPU has no flash attention")
    draw = torch.Generator(device).manual_seed(0)
    query = torch.randn(2, 4, len(ROW), 32, generator=draw, device=device, dtype=torch.bfloat16)
    key, value = (
        torch.randn(2, kv_heads, len(ROW), 32, generator=draw, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    found = documents.average(query, key, value, documents.boundaries(rows(), END).to(device), 0.2)
    mask = documents.bias(documents.numbers(rows().to(device), END), dtype=torch.float32)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, scale=0.2, enable_gqa=kv_heads != 4
    )
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
