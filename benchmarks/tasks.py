"""Scoring of multiple choice beside lm-evaluation-harness with transformers, on the same weights.

    python benchmarks/tasks.py [--shape 12x384x16x64] [--rounds 5] [--out FILE.json]

A shape is layers x width x batch x items. Both score the same tokens in micro-batches of the same size, in fp32, in one
process and by turns: two workloads with the lengths of PIQA (two choices of a sentence) and of ARC (four short ones).
transformers runs its own LLaMA with its default attention, under the harness's own `hf` model.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from generate import llama_of
from out_path import out_path

from stablelm.config import rules
from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.tasks.choice_items import Request
from stablelm.evaluate.tasks.likelihood import Shapes, loglikelihoods

OURS, THEIRS = "stablelm", "lm-eval-hf"
WORKLOADS = {"piqa": ((5, 30), (5, 45), 2), "arc": ((15, 60), (2, 12), 4)}
"""Tokens of a query and of a choice, from and to, and the number of choices."""
RANKS = Ranks(0, 1, torch.device("cpu"), None, None)


def requests_of(workload: str, items: int, vocab: int) -> list[Request]:
    """Of random tokens."""
    draw = random.Random(0)
    query, choice, choices = WORKLOADS[workload]

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(draw.randint(least, most)))

    queries = [tokens(*query) for _ in range(items)]
    return [Request(context, tokens(*choice)) for context in queries for _ in range(choices)]


def config_of(layers: int, width: int, vocab: int, longest: int) -> Config:
    """A model that LLaMA's architecture expresses."""
    keys = {
        "model.n_layers": layers,
        "model.d_model": width,
        "model.n_heads": max(1, width // 64),
        "model.vocab_size": vocab,
        "model.activation": "swiglu",
        "model.norm": "rmsnorm",
        "model.attention.position": "rope",
        "data.seq_len": longest,
        "train.steps": 1,
    }
    loaded = load([], [f"{name}={value}" for name, value in keys.items()])
    return rules.resolve(loaded.config, pieces=vocab, world_size=1, accelerate_precision=None)


def harness_of(engine: Engine, batch: int) -> Any:
    """lm-evaluation-harness's `hf` model with the engine's weights."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<unk>", pad_token="<unk>")
    return HFLM(pretrained=llama_of(engine.module), tokenizer=tokenizer, batch_size=batch, device="cpu")  # type: ignore[arg-type]


def compare(shape: tuple[int, int, int, int], workload: str, rounds: int, vocab: int) -> list[dict[str, Any]]:
    """Requests a second of both, and round by round ours over theirs."""
    layers, width, batch, items = shape
    requests = requests_of(workload, items, vocab)
    config = config_of(layers, width, vocab, 128)
    engine = build_engine(config, "single", RANKS, train=False)
    harness, shapes = harness_of(engine, batch), Shapes.of(config, batch)
    asked = [(("", ""), list(context), list(rest)) for context, rest in requests]
    acts: dict[str, Callable[[], list[float]]] = {
        OURS: lambda: [one.log_probability for one in loglikelihoods(engine, RANKS, requests, shapes)],
        THEIRS: lambda: [one for one, _ in harness._loglikelihood_tokens(asked, disable_tqdm=True)],
    }
    ours, theirs = (torch.tensor(act()) for act in acts.values())
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3), "the scores differ"
    speeds: dict[str, list[float]] = {name: [] for name in acts}
    for round_ in range(rounds):
        for name in sorted(acts, reverse=round_ % 2 == 1):
            begun = time.perf_counter()
            acts[name]()
            speeds[name].append(len(requests) / (time.perf_counter() - begun))
    words = f"{workload} {'x'.join(map(str, shape))}"
    ratios = [a / b for a, b in zip(speeds[OURS], speeds[THEIRS], strict=True)]
    found = [record(name, words, values, "requests/s") for name, values in speeds.items()]
    return [*found, record(f"{OURS} / {THEIRS}", words, ratios, "ratio")]


def record(name: str, shape: str, values: list[float], unit: str) -> dict[str, Any]:
    spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {"name": name, "shape": shape, "metric": "requests_per_second", **spread, "unit": unit}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="12x384x16x64", help="layers x width x batch x items")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=out_path, help="write the records to this JSON file")
    options = parser.parse_args(arguments)
    layers, width, batch, items = (int(part) for part in options.shape.split("x"))
    records = []
    for workload in WORKLOADS:
        records += compare((layers, width, batch, items), workload, options.rounds, options.vocab)
    for each in records:
        numbers = "".join(f"{each[key]:>12,.3f}" for key in ("median", "low", "high"))
        print(f"{each['name']:24}{each['shape']:24}{numbers}  {each['unit']}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
