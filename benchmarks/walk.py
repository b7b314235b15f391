"""Walks every combination of stream, placement, norm, initialisation and reparametrisation at a tiny size.

    python benchmarks/walk.py [--jobs 1] [--steps 20] [--only stream=concat,norm=dyt] [--out walk.json]

A legal combination must have a finite predicted stream variance at every layer, and finite losses over some steps of
AdamW; a refused one must say which keys are to blame and what to use instead. What else a combination needs is as in
`pre_ln`; a stream without skips gets the attention it asks for. Exit code 1 if any combination fails.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from out_path import out_path
from torch import Tensor

from stablelm.config.keys import choices
from stablelm.config.schema import (
    AttentionConfig,
    ModelConfig,
    TrainConfig,
)
from stablelm.engine.after_step import Reparametrised
from stablelm.engine.optimizers import make_optimizer
from stablelm.methods import catalogue
from stablelm.methods.catalogue import apply_method
from stablelm.methods.completep import CompletepOptions
from stablelm.methods.deepscalelm import DeepscaleOptions
from stablelm.methods.sigma_reparam import SigmaOptions
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise, roles
from stablelm.probe.predict import predict

LAYERS, WIDTH, HEADS, SEQ_LEN, VOCABULARY, BATCH = 2, 32, 2, 16, 64, 2
LR = 1e-3
AXES: dict[str, tuple[str, ...]] = {
    **{axis: choices(f"model.{axis}") for axis in ("stream", "placement", "norm", "init")},
    "reparam": (
        *(name for name in choices("model.reparam") if name != "sigma"),
        *("sigma:all:spectral", "sigma:all:one", "sigma:attention:spectral", "sigma:attention:one"),
    ),
}


class Outcome(NamedTuple):
    """What became of a combination; `kind`: legal, refused or failed, `told`: the sentence or the error."""

    combination: dict[str, str]
    kind: str
    told: str


def combinations(only: dict[str, str]) -> Iterator[dict[str, str]]:
    """All points of the walk, or those that have the values of `only`."""
    axes = {name: (only[name],) if name in only else values for name, values in AXES.items()}
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def model_of(combination: dict[str, str]) -> ModelConfig:
    """The tiny model of a combination, its axes filled."""
    reparam, _, sigma = combination["reparam"].partition(":")
    targets, _, gamma = sigma.partition(":")
    shaped = combination["stream"] in ("skipless", "weighted") and combination["init"] == "orthogonal"
    axes: dict[str, Any] = combination | {"reparam": reparam}
    options: dict[str, Any] = {"targets": targets, "gamma": gamma} if sigma else {}
    return apply_method(
        ModelConfig(
            n_layers=LAYERS,
            d_model=WIDTH,
            n_heads=HEADS,
            kv_heads=HEADS,
            max_seq_len=SEQ_LEN,
            vocab_size=VOCABULARY,
            attention=AttentionConfig(shaping="espa" if shaped else "none"),
            # The defaults are for more layers and width than these: lambda would be 0, and every ratio 1.
            options=(
                SigmaOptions(**options),
                DeepscaleOptions(k=0.5),
                CompletepOptions(base_depth=1, base_width=16),
            ),
            **axes,
        )
    )


def try_out(combination: dict[str, str], steps: int) -> Outcome:
    """Legal with finite variances and losses, refused with keys and a mend, or failed."""
    try:
        model = model_of(combination)
        found = catalogue.problems(model)
        if found:
            told = "; ".join(_bad_refusals(found))
            return Outcome(combination, "failed" if told else "refused", told or found[0][0])
        told = check(model.axes.stream.sized(model), steps)
    except Exception as error:  # a combination's crash is a finding, not the end of the walk
        told = f"{type(error).__name__}: {error}"
    return Outcome(combination, "failed" if told else "legal", told)


def _bad_refusals(found: list[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Refusals that leave the user without the keys or without a way on."""
    return [
        f"a refusal without its keys or a mend: {sentence}"
        for sentence, keys in found
        if not keys or "use " not in sentence or not all(f"{key}=" in sentence for key in keys)
    ]


def check(model: ModelConfig, steps: int) -> str:
    """What is wrong with a legal model, empty if nothing: predicted variances, then losses, must be finite."""
    variances = predict(model, seq_len=SEQ_LEN).stream_variance
    if not np.isfinite(variances).all():
        return f"predicted stream variances {variances}"
    losses = train(model, steps)
    return "" if all(math.isfinite(loss) for loss in losses) else f"losses {losses}"


def train(model: ModelConfig, steps: int) -> list[float]:
    """The loss of the same random tokens before each step and after the last."""
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    optimizer = make_optimizer(dict(decoder.named_parameters()), roles(decoder), TrainConfig(lr=LR), model)
    sigma = Reparametrised(decoder)
    text = torch.randint(VOCABULARY, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))

    def mean_loss() -> Tensor:
        sums = decoder(text[:, :-1], text[:, 1:])
        return sums.total / sums.valid

    losses = []
    for _ in range(steps):
        loss = mean_loss()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        sigma.update(torch.tensor(False))
    with torch.no_grad():
        return [*losses, mean_loss().item()]


def walk(only: dict[str, str], steps: int, jobs: int) -> list[Outcome]:
    """The outcome of every combination, in order; says every minute how far it is."""
    wanted = list(combinations(only))
    if jobs == 1:
        _one_thread()
        return _told(map(try_out, wanted, itertools.repeat(steps)), len(wanted))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        return _told(pool.map(try_out, wanted, itertools.repeat(steps), chunksize=16), len(wanted))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _told(outcomes: Iterable[Outcome], total: int) -> list[Outcome]:
    done, said = [], time.monotonic()
    for outcome in outcomes:
        done.append(outcome)
        if outcome.kind == "failed":
            print(f"failed: {_named(outcome)}: {outcome.told}", flush=True)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"{len(done)} of {total}", flush=True)
    return done


def _named(outcome: Outcome) -> str:
    return " ".join(f"{axis}={value}" for axis, value in outcome.combination.items())


def summarise(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Counts, refusals by the first of their reasons, and what failed."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    # A sentence begins with the values of its keys; the reason comes after them.
    reasons = Counter(outcome.told.partition(": ")[2] for outcome in outcomes if outcome.kind == "refused")
    return {
        "combinations": len(outcomes),
        "legal": kinds["legal"],
        "refused": kinds["refused"],
        "failed": kinds["failed"],
        "seconds": round(seconds, 1),
        "refused_by_reason": dict(reasons.most_common()),
        "failures": [o.combination | {"error": o.told} for o in outcomes if o.kind == "failed"],
    }


def _only(text: str) -> dict[str, str]:
    """`axis=value,axis=value` as a mapping."""
    wanted: dict[str, str] = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    for axis, value in wanted.items():
        if value not in AXES.get(axis, ()):
            choices = " ".join(AXES.get(axis, AXES))
            raise argparse.ArgumentTypeError(f"{axis}={value} is not on the walk; choose one of {choices}")
    return wanted


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each legal combination")
    parser.add_argument("--only", type=_only, default={}, help="fixed axes, such as stream=concat,norm=dyt")
    parser.add_argument("--out", type=out_path, help="write the summary to this JSON file")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    outcomes = walk(options.only, options.steps, options.jobs)
    summary = summarise(outcomes, time.monotonic() - start)
    for reason, count in summary["refused_by_reason"].items():
        print(f"{count:6} refused: {reason}")
    print(", ".join(f"{summary[kind]} {kind}" for kind in ("combinations", "legal", "refused", "failed")), end="")
    print(f" in {summary['seconds']:g} s")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(summary, file, indent=1)
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
