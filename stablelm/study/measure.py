"""What a trained model is measured by beside its loss: `python -m stablelm.study.measure CONFIG_FILE OUT.json`.

Losses window by window, for comparisons that draw the validation text again; and the use of layers: how much the loss
rises when what one layer writes is left out, or what a block of a tenth of them writes, how far a layer turns the
stream, and how many layers the rises come to (their participation ratio). And signal and gradient by layer before the
first step, beside the theory.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stablelm.config.load import Loaded
from stablelm.data import inspection, validation
from stablelm.data.validation import ValidationSet
from stablelm.evaluate import consent
from stablelm.evaluate.trained_run import TrainedRun, load_module, open_run
from stablelm.evaluate.validation_text import validation_options, validation_paths
from stablelm.model.decoder import Decoder
from stablelm.model.sublayer import Chunks, Sublayer
from stablelm.model.targets import IGNORED
from stablelm.new_files import replace_file
from stablelm.observe.layers import rows_for
from stablelm.probe import prober

ROWS = 16  # windows of a pass
ABLATED_WINDOWS = 16
MOST_LAYERS = 32  # left out one by one
BLOCKS = 10
STARTS = ("stream_variance", "gradient_norm")


def measure(config_file: str) -> dict[str, Any]:
    """Figures of the newest checkpoint of the run that a configuration file describes. Raises UserError."""
    own = consent.own_configuration([config_file])
    assert own is not None
    run = open_run(own.config.run.dir, own=own, trusted=True)
    module, data = load_module(run), validation_set(run)
    with torch.no_grad():
        windows = [round(value, 5) for value in window_losses(module, data)]
        return {"windows": windows, **use_of_layers(module, data), "start": at_start(own)}


def at_start(loaded: Loaded) -> dict[str, list[float | None]]:
    """The probe's STARTS by boundary of layers from 0, and `predicted_` ones, None where there is no prediction."""
    seq_len = loaded.config.data.seq_len
    with TemporaryDirectory() as folder, torch.enable_grad():
        made = prober.make(prober.prepare(loaded, folder, rows_for(seq_len), seq_len))
    found = {name: made.found(name) for name in STARTS} | {f"predicted_{name}": made.predicted(name) for name in STARTS}
    return {name: [_short(float(value)) for value in column] for name, column in found.items()}


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def validation_set(run: TrainedRun) -> ValidationSet:
    """The windows of the first validation set, as the run evaluates itself on them."""
    config = run.config
    name, path = next(iter(validation_paths(config).items()))
    options = validation_options(config, name)
    files = inspection.text_files(path, key=f"data.validation.{name}", cache=config.data.cache, options=options)
    count = config.evaluate.batches * config.train.batch_sizes.first
    return validation.read(files, run.tokenizer, seq_len=config.data.seq_len, sequences=count, options=options)


def window_losses(module: Decoder, data: ValidationSet) -> list[float]:
    """Mean loss of each window, nats per token; those without a target are left out."""
    losses: list[float] = []
    for first in range(0, len(data.tokens), ROWS):
        tokens, targets = data.tokens[first : first + ROWS], data.targets[first : first + ROWS]
        valid = targets != IGNORED
        found = _token_losses(module, tokens, targets)
        losses += [float(found[row][valid[row]].mean()) for row in range(len(tokens)) if valid[row].any()]
    return losses


def _token_losses(module: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """(rows, seq), float32; of no meaning where there is no target."""
    places = torch.arange(targets.numel())
    scores = module(tokens, targets.clamp(min=0).flatten(), places=places)
    return -scores.log_probability.float().view_as(targets)


def use_of_layers(module: Decoder, data: ValidationSet) -> dict[str, Any]:
    """Rises of the loss, in nats, of the first windows: by layer and by block; angles by layer, in half turns."""
    tokens, targets = data.tokens[:ABLATED_WINDOWS], data.targets[:ABLATED_WINDOWS]
    valid = targets != IGNORED

    def loss(left_out: Sequence[int] = ()) -> float:
        with silenced(module, left_out):
            return float(_token_losses(module, tokens, targets)[valid].mean())

    count, base = len(module.layers), loss()
    chosen = sorted({round(place * (count - 1) / (MOST_LAYERS - 1)) for place in range(MOST_LAYERS)})
    bounds = sorted({round(place * count / BLOCKS) for place in range(BLOCKS + 1)})
    rises = {layer: loss([layer]) - base for layer in chosen}
    blocks = {f"{a}-{b - 1}": loss(range(a, b)) - base for a, b in pairwise(bounds)}
    positive = [max(0.0, rise) for rise in rises.values()]
    return {
        "layer_rises": {layer: round(rise, 5) for layer, rise in rises.items()},
        "block_rises": {block: round(rise, 5) for block, rise in blocks.items()},
        "angles": [round(angle, 5) for angle in angles(module, tokens)],
        "share_of_layers": round(participation(positive) / len(positive), 4),
    }


def participation(rises: Sequence[float]) -> float:
    """(sum)^2 / sum of squares: as many as there are for equal ones, 1 for a single one, 0 for none."""
    squares = sum(rise**2 for rise in rises)
    return sum(rises) ** 2 / squares if squares else 0.0


def _zeros(_body: Any, _inputs: Any, output: Any) -> Tensor:
    return torch.zeros_like(output)


@contextmanager
def silenced(module: Decoder, layers: Sequence[int]) -> Iterator[None]:
    """Bodies of these layers compute zeros: nothing is written onto the stream but what the stream itself does."""
    handles = [
        sublayer.body.register_forward_hook(_zeros)
        for layer in layers
        for sublayer in module.layers[layer].modules()
        if isinstance(sublayer, Sublayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def angles(module: Decoder, tokens: Tensor) -> list[float]:
    """Between the stream before and after each layer, mean over tokens, from 0 to 1 for opposite (Gromov et al. 2024).

    Of streams of several tensors, what the head would read of them; empty where that changes its width.
    """
    states: list[Tensor] = []

    def tap(index: int, chunks: Chunks) -> Chunks:
        states.append(module.stream.finish(chunks).float())
        return chunks

    module.tap = tap
    try:
        module(tokens)
    finally:
        module.tap = None
    if len({state.shape for state in states}) > 1:
        return []
    cosines = (torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1) for a, b in pairwise(states))
    return [float(cosine.arccos().mean()) / math.pi for cosine in cosines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    replace_file(Path(sys.argv[2]), json.dumps(measure(sys.argv[1])) + "\n")
