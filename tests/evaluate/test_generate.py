"""Continuations against transformers and the whole sequence; rows, seeds, ends and what is refused."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from support.letters import LetterTokenizer
from torch import Tensor

from benchmarks.generate import language_of, llama_config, llama_of, ours, theirs
from stablelm.config.schema import AttentionConfig, ModelConfig
from stablelm.errors import ConfigError
from stablelm.evaluate.generation.generate import Language, Watcher, continue_prompts
from stablelm.evaluate.generation.loaded_model import fixed
from stablelm.evaluate.generation.prompts import Prompt, beyond_training, encode_prompts
from stablelm.evaluate.generation.sampling import Sampling
from stablelm.methods.axes import Method, Model, Position
from stablelm.methods.catalogue import METHODS, apply_method
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise

PROMPTS = [[5, 9, 2, 40, 7], [3, 3, 60], [11], [8, 20, 30, 40, 50, 60, 9, 1]]
PIECES = 70


class Words(LetterTokenizer):
    """A token a letter of the alphabet from ' '; the last one ends documents."""

    pieces, eos = PIECES, PIECES - 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(token + 32) for token in ids if token != self.eos)


def decoder_of(method: str = "pre_ln", *, vocab: int = 96, positions: int = 64, scale: float = 4.0) -> Decoder:
    """A small model whose logits are far enough from each other to be told apart."""
    model = ModelConfig(method=method, n_layers=3, d_model=32, n_heads=4, kv_heads=4, vocab_size=vocab)
    model = apply_method(replace(model, max_seq_len=positions))
    model = model.axes.stream.sized(model)
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    with torch.no_grad():
        (decoder.embedding if decoder.head is None else decoder.head).weight.mul_(scale)
    return decoder.eval()


def language(decoder: Decoder, *, keeps: bool = True) -> Language:
    def forward(tokens: Tensor, columns: Tensor, cache: KeyValueCache | None) -> Tensor:
        assert (cache is not None) == keeps
        return decoder(tokens, cache=cache, logits_at=columns)

    return Language(forward, decoder.config, Words(), torch.device("cpu"))


def likeliest(decoder: Decoder, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding from the whole sequence each time, written out."""
    tokens = list(prompt)
    for _ in range(new):
        logits = decoder.logits(decoder(torch.tensor([tokens]))[0, -1])[:PIECES]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == Words.eos:
            break
    return tokens[len(prompt) :]


def tokens_of(found) -> list[list[int]]:
    return [each.tokens for each in found]


def test_greedy_texts_are_those_of_transformers():
    pytest.importorskip("transformers")
    config = llama_config(3, 32, 4, 2, PIECES, 64)
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    found = ours(language_of(decoder.eval()), PROMPTS, 20)
    llama = llama_of(decoder)
    assert found == theirs(llama, PROMPTS, 20)
    assert found == [theirs(llama, [prompt], 20)[0] for prompt in PROMPTS]
    assert len({tuple(text) for text in found}) == len(PROMPTS)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_greedy_texts_are_the_likeliest_tokens_of_the_whole_sequence(method: str):
    decoder = decoder_of(method)
    prompts = [Prompt(tokens) for tokens in PROMPTS]
    found = continue_prompts(language(decoder), prompts, Sampling(12, temperature=0), batch_size=3)
    assert tokens_of(found) == [likeliest(decoder, tokens, 12) for tokens in PROMPTS]


def test_a_sample_depends_on_its_prompt_number_and_seed_alone():
    asked, sampling = language(decoder_of()), Sampling(16, temperature=1.5, top_p=0.95, repetition_penalty=1.1)
    prompts = [Prompt(tokens, number) for tokens in PROMPTS for number in range(3)]
    alone = [tokens_of(continue_prompts(asked, [prompt], sampling))[0] for prompt in prompts]
    assert len(set(map(tuple, alone))) == len(prompts)
    for batch_size in (1, 5, 12):
        assert tokens_of(continue_prompts(asked, prompts, sampling, batch_size=batch_size)) == alone
        turned = continue_prompts(asked, prompts[::-1], sampling, batch_size=batch_size)
        assert tokens_of(turned) == alone[::-1]
    other = continue_prompts(asked, prompts, replace(sampling, seed=1))
    assert not set(map(tuple, tokens_of(other))) & set(map(tuple, alone))


def test_each_token_passes_through_the_model_once():
    decoder, seen = decoder_of(), []
    decoder.embedding.register_forward_hook(lambda _, inputs, out: seen.append(tuple(inputs[0].shape)))
    sampling = Sampling(9, temperature=1.0)
    asked = replace(language(decoder), tokenizer=_without_end())
    continue_prompts(asked, [Prompt([1, 2, 3], 0), Prompt([1, 2, 3], 1), Prompt([4], 0)], sampling)
    assert seen == [(2, 3)] + [(3, 1)] * 8  # equal prompts are read once


def _without_end() -> Any:
    words = Words()
    words.eos = -1  # type: ignore[misc]
    return words


def test_rows_end_at_the_end_token_and_leave_the_batch():
    decoder, sizes = decoder_of(), []
    decoder.embedding.register_forward_hook(lambda _, inputs, out: sizes.append(len(inputs[0])))
    greedy = Sampling(30, temperature=0)
    free = continue_prompts(replace(language(decoder), tokenizer=_without_end()), [Prompt(PROMPTS[0])], greedy)[0]
    words = Words()
    words.eos = free.tokens[4]  # type: ignore[misc]
    first = free.tokens.index(words.eos)
    sizes.clear()
    found = continue_prompts(
        replace(language(decoder), tokenizer=words), [Prompt(PROMPTS[0]), Prompt(PROMPTS[3])], greedy
    )
    assert found[0].tokens == free.tokens[: first + 1]
    assert found[0].ended == "eos"
    assert found[0].text == words.decode(free.tokens[:first])
    assert sizes[first] == 2
    assert sizes[-1] == 1


def test_padding_of_the_vocabulary_is_never_drawn():
    decoder = decoder_of()
    with torch.no_grad():
        decoder.head_weight()[PIECES:] *= 100
    for sampling in (Sampling(40, temperature=0), Sampling(40, temperature=30.0)):
        found = continue_prompts(language(decoder), [Prompt([1])], sampling)[0]
        assert max(found.tokens) < PIECES


def test_stop_strings_and_what_is_told_while_a_text_grows():
    asked, parts = language(decoder_of()), {0: "", 1: ""}
    prompts, sampling = [Prompt(PROMPTS[0]), Prompt(PROMPTS[1])], Sampling(20, temperature=0)
    whole = continue_prompts(replace(asked, tokenizer=_without_end()), prompts, sampling)
    stop = whole[0].text[3:5]
    at = whole[0].text.find(stop)

    def grown(index: int, text: str) -> None:
        parts[index] += text

    found = continue_prompts(asked, prompts, replace(sampling, stop=(stop,)), watcher=Watcher(grown=grown))
    assert found[0].text == whole[0].text[:at]
    assert found[0].ended == "stop"
    assert parts == {0: found[0].text, 1: found[1].text}


def test_ranks_take_the_agreed_tokens():
    asked = language(decoder_of())
    found = continue_prompts(asked, [Prompt([1])], Sampling(4), watcher=Watcher(agree=lambda tokens: [7]))
    assert found[0].tokens == [7, 7, 7, 7]


@dataclass(frozen=True)
class Shares(Position):
    """Queries and keys that depend on the length of the text, so that nothing can be kept."""

    name: ClassVar[str] = "shares"

    def tables(self, model: Model, seq_len: int, d_head: int, **where: Any) -> tuple[Tensor, ...]:
        return (1 + 3 * torch.arange(seq_len, **where)[:, None, None] / seq_len,) * 2

    def turn(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        return x * tables[0]

    def cache_obstacle(self, model: Model) -> str:
        return "its positions are shares of the text's length"


SHARES = Method("shares", "none", {"attention.position": "shares"}, (Shares(),))


@torch.no_grad()
def test_without_a_cache_each_row_is_read_again():
    """No row is filled up, because its length counts."""
    decoder = decoder_of("test_generate:SHARES")
    prompts = [Prompt(tokens) for tokens in PROMPTS]
    found = continue_prompts(language(decoder, keeps=False), prompts, Sampling(8, temperature=0))
    assert tokens_of(found) == [likeliest(decoder, tokens, 8) for tokens in PROMPTS]


def test_prompts_are_checked_together():
    decoder = decoder_of("gpt2", positions=16)
    asked = language(decoder)
    with pytest.raises(ConfigError) as error:
        encode_prompts(["", "abcd", "a" * 16, "\udc80"], asked.tokenizer, asked.config, new_tokens=13)
    assert str(error.value).split("\n") == [
        "prompt 1 is empty; give it at least a word",
        "prompt 2 has 4 tokens, with max_new_tokens=13 more than the 16 positions of the model's table "
        "(model.max_seq_len); ask for at most 12 new tokens, or shorten it",
        "prompt 3 has 16 tokens, with max_new_tokens=13 more than the 16 positions of the model's table "
        "(model.max_seq_len); shorten it",
        "prompt 4 is not Unicode text; write it in UTF-8",
    ]
    found = encode_prompts(["abcd"], asked.tokenizer, asked.config, new_tokens=12)
    assert len(continue_prompts(asked, found, Sampling(12))[0].tokens) <= 12


def test_positions_beyond_those_of_training_are_used_and_said():
    asked = language(decoder_of(positions=16))
    prompts = encode_prompts(["abcd"], asked.tokenizer, asked.config, new_tokens=30)
    assert beyond_training(prompts, asked.config, 12) == ""
    assert "beyond the 16 tokens" in beyond_training(prompts, asked.config, 13)
    assert continue_prompts(asked, prompts, Sampling(30))


def test_a_beginning_of_documents_comes_before_each_prompt():
    words, model = Words(), decoder_of().config
    words.bos = 42
    assert encode_prompts(["ab"], words, model, new_tokens=8)[0].tokens[0] == ord("a") - 32
    words.add_bos = True
    assert encode_prompts(["ab"], words, model, new_tokens=8)[0].tokens[:2] == [42, ord("a") - 32]
    found = encode_prompts(["a", "b", "a"], words, model, new_tokens=8, samples=2)
    assert [each.number for each in found] == [0, 1, 0, 1, 2, 3]


@torch.no_grad()
def test_after_an_end_token_nothing_before_it_is_seen():
    """With attention within documents, a prompt of two documents is continued like its last one."""
    model = decoder_of().config
    model = replace(model, attention=replace(model.attention, document_end=Words.eos))
    assert isinstance(model.attention, AttentionConfig)
    decoder = Decoder(model, "fp32").eval()
    decoder.load_state_dict(decoder_of().state_dict())
    greedy = Sampling(10, temperature=0)
    both = [Prompt([9, 4, Words.eos, 5, 6]), Prompt([5, 6])]
    first, second = continue_prompts(language(decoder), both, greedy)
    assert first.tokens == second.tokens
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        continue_prompts(language(decoder), both, greedy, batch_size=0)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_fixed_model_computes_the_same(method: str):
    decoder, other = decoder_of(method, scale=1.0), decoder_of(method, scale=1.0)
    tokens = torch.tensor(PROMPTS[3:])
    torch.testing.assert_close(fixed(other)(tokens), decoder(tokens), rtol=1e-5, atol=1e-5)
    names = {name: value.shape for name, value in decoder.state_dict().items()}
    assert {name: value.shape for name, value in other.state_dict().items()} == names
