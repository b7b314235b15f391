"""Text generation beside transformers' `generate` with the same weights, and what a token costs as a text grows.

    python benchmarks/generate.py [--shape 12x384x8x64] [--new-tokens 128] [--rounds 5] [--out FILE.json]

A shape is layers x width x batch x prompt length. Both take the likeliest token, in fp32, from the same prompts, in one
process and by turns; transformers runs its own LLaMA with its default attention and cache. `seconds_per_token` is of
`stablelm` alone, for texts that are twice as long each time: with a cache the ratio of neighbours stays near 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.out_path import out_path
from stablelm.config.schema import AttentionConfig, ModelConfig
from stablelm.evaluate.generation.generate import Language, continue_prompts
from stablelm.evaluate.generation.loaded_model import fixed
from stablelm.evaluate.generation.prompts import Prompt
from stablelm.evaluate.generation.sampling import Sampling
from stablelm.methods.catalogue import apply_method
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.tokenizers import Tokenizer

OURS, THEIRS = "stablelm", "transformers"
Shape = tuple[int, int, int, int]


class NoText:
    """What continuing tokens asks of a tokenizer: tokens without text, of which none ends a document."""

    eos = -1

    def __init__(self, pieces: int):
        self.pieces = pieces

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {token}" for token in ids)


def llama_config(n_layers: int, d_model: int, n_heads: int, kv_heads: int, vocab: int, positions: int) -> ModelConfig:
    """A model that LLaMA's architecture expresses."""
    model = ModelConfig(
        method="pre_ln",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        kv_heads=kv_heads,
        max_seq_len=positions,
        vocab_size=vocab,
        activation="swiglu",
        norm="rmsnorm",
        attention=AttentionConfig(position="rope"),
    )
    model = apply_method(model)
    return model.axes.stream.sized(model)


def llama_of(decoder: Decoder) -> Any:
    """transformers' LlamaForCausalLM with the weights of a decoder of `llama_config`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = decoder.config
    assert config.vocab_size and config.d_ff and config.max_seq_len
    asked = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(asked).eval()
    own = {name: value.detach() for name, value in decoder.named_parameters()}
    weights = {"model.embed_tokens.weight": own["embedding.weight"], "lm_head.weight": own["head.weight"]}
    weights["model.norm.weight"] = own["norm_final.weight"]
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, other in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            weights[f"{theirs}.self_attn.{other}_proj.weight"] = own[f"{ours}.attention.body.{name}.weight"]
        for name, other in (("fc1", "up"), ("gate", "gate"), ("fc2", "down")):
            weights[f"{theirs}.mlp.{other}_proj.weight"] = own[f"{ours}.feedforward.body.{name}.weight"]
        weights[f"{theirs}.input_layernorm.weight"] = own[f"{ours}.attention.norm_in.weight"]
        weights[f"{theirs}.post_attention_layernorm.weight"] = own[f"{ours}.feedforward.norm_in.weight"]
    model.load_state_dict(weights)
    return model


def language_of(decoder: Decoder) -> Language:
    """What generation asks for, without text."""
    assert decoder.config.vocab_size is not None
    return Language(
        lambda tokens, columns, cache: decoder(tokens, cache=cache, logits_at=columns),
        decoder.config,
        cast(Tokenizer, NoText(decoder.config.vocab_size)),
        torch.device("cpu"),
    )


def ours(language: Language, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The new tokens of each prompt, the likeliest ones."""
    sampling = Sampling(max_new_tokens=new, temperature=0)
    found = continue_prompts(language, [Prompt(tokens) for tokens in prompts], sampling, batch_size=len(prompts))
    return [each.tokens for each in found]


def theirs(llama: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The same by transformers, prompts of unequal length filled up on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        found = llama.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return found[:, longest:].tolist()


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def record(name: str, shape: str, metric: str, values: list[float], unit: str) -> dict[str, Any]:
    spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {"name": name, "shape": shape, "metric": metric, **spread, "unit": unit}


def compare(shape: Shape, new: int, rounds: int, vocab: int, only: set[str]) -> list[dict[str, Any]]:
    """New tokens a second of both, and round by round ours over theirs."""
    layers, width, batch, length = shape
    config = llama_config(layers, width, max(1, width // 64), max(1, width // 64), vocab, length + new)
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    acts: dict[str, Callable[[], list[list[int]]]] = {}
    prompts = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    if THEIRS in only:
        llama = llama_of(decoder)
        acts[THEIRS] = lambda: theirs(llama, prompts, new)
    if OURS in only:
        language = language_of(fixed(decoder.eval()))
        acts[OURS] = lambda: ours(language, prompts, new)
    texts = [act() for act in acts.values()]
    assert all(text == texts[0] for text in texts), "the texts differ"
    speeds: dict[str, list[float]] = {name: [] for name in acts}
    for round_ in range(rounds):
        for name in sorted(acts, reverse=round_ % 2 == 1):
            speeds[name].append(batch * new / seconds(acts[name]))
    words = "x".join(map(str, shape))
    found = [record(name, words, "tokens_per_second", values, "tokens/s") for name, values in speeds.items()]
    if len(speeds) == 2:
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[THEIRS], strict=True)]
        found.append(record(f"{OURS} / {THEIRS}", words, "tokens_per_second", ratios, "ratio"))
    return found


def growth(shape: Shape, longest: int, rounds: int, vocab: int) -> list[dict[str, Any]]:
    """Seconds a new token over texts of doubling length, up to `longest`, from prompts of one token."""
    layers, width, batch, _ = shape
    config = llama_config(layers, width, max(1, width // 64), max(1, width // 64), vocab, longest + 1)
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    language, prompts = language_of(fixed(decoder.eval())), [[row % vocab] for row in range(batch)]
    lengths = [longest // 4, longest // 2, longest]
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for length in lengths:
            times[length].append(seconds(lambda length=length: ours(language, prompts, length)) / length)
    words = f"{layers}x{width}x{batch}"
    return [record(OURS, f"{words}x{length}", "seconds_per_token", values, "s") for length, values in times.items()]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="12x384x8x64", help="layers x width x batch x prompt length")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=512, help="longest text of the second part; 0: leave it out")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=f"{OURS},{THEIRS}", help="names, separated by commas")
    parser.add_argument("--out", type=out_path, help="write the records to this JSON file")
    options = parser.parse_args(arguments)
    layers, width, batch, length = (int(part) for part in options.shape.split("x"))
    shape = (layers, width, batch, length)
    records = compare(shape, options.new_tokens, options.rounds, options.vocab, set(options.only.split(",")))
    if options.longest:
        records += growth(shape, options.longest, options.rounds, options.vocab)
    for each in records:
        numbers = "".join(f"{each[key]:>14,.4f}" for key in ("median", "low", "high"))
        print(f"{each['name']:24}{each['shape']:18}{each['metric']:20}{numbers}  {each['unit']}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
