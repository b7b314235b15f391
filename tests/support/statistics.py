"""What a whole model does at initialisation: its signal, its gradient and its loss, measured with hooks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.loss import LossSums
from stablelm.model.sublayer import Chunks

VOCABULARY, SEQ_LEN, BATCH = 4096, 128, 2
Gradients = Literal["none", "stream", "all"]


@dataclass(frozen=True)
class Measured:
    """One model on one batch; by layer boundary 0 ... n_layers as `probe.predict.Prediction`, nan where nothing is.

    `gradient_norm`: of the mean loss to the whole stream of all tokens; `weight_gradient_norm`: to all matrices of
    layer 1 ... together; `loss`: mean cross-entropy in nats; `collision`: the share of pairs of positions of a
    sequence that hold the same token.
    """

    stream_variance: NDArray[np.float64]
    token_correlation: NDArray[np.float64]
    attention_branch_variance: NDArray[np.float64]
    feedforward_branch_variance: NDArray[np.float64]
    gradient_norm: NDArray[np.float64]
    weight_gradient_norm: NDArray[np.float64]
    loss: float
    collision: float

    @property
    def gradient_ratio(self) -> NDArray[np.float64]:
        """Variance of the gradient at each boundary over that at the stream's end."""
        return (self.gradient_norm / self.gradient_norm[-1]) ** 2


def resolved(method: str, n_layers: int, d_model: int, *overrides: str, n_heads: int = 4) -> ModelConfig:
    """The model section of a resolved config for sequences of SEQ_LEN tokens out of VOCABULARY; overrides come last."""
    sizes = {"method": method, "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads}
    keys = [f"model.{key}={value}" for key, value in sizes.items()]
    config = load([], [*keys, "train.steps=5", f"data.seq_len={SEQ_LEN}", *overrides]).config
    return resolve(config, pieces=VOCABULARY, world_size=1, accelerate_precision=None).model


def zipf_tokens(batch: int, seq_len: int, seed: int) -> Tensor:
    """(batch, seq_len) tokens, the r-th of the vocabulary with a probability proportional to 1 / r."""
    weights = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights.expand(batch, -1), seq_len, replacement=True, generator=generator)


def collision(tokens: Tensor) -> float:
    """The share of pairs of different positions of a sequence that hold the same token; tokens: (batch, seq)."""
    seq_len = tokens.shape[1]
    same = (tokens[:, :, None] == tokens[:, None, :]).double().sum(dim=(1, 2)).mean().item()
    return (same - seq_len) / (seq_len * (seq_len - 1))


def token_correlation(x: Tensor) -> float:
    """Mean cosine of two different tokens of a sequence; x: (batch, seq, width)."""
    seq_len, unit = x.shape[1], x.double() / x.double().norm(dim=-1, keepdim=True)
    return ((unit.sum(dim=1).square().sum(dim=-1) - seq_len) / (seq_len * (seq_len - 1))).mean().item()


def make_decoder(config: ModelConfig, seed: int, weights: ModelConfig | None = None) -> Decoder:
    """A Decoder of `config` in evaluation mode, with the initial values that `weights` (None: it, too) asks for."""
    decoder = Decoder(config, "fp32")
    initialise(decoder, weights or config, seed)
    return decoder.eval()


def measure(
    config: ModelConfig,
    seed: int,
    *,
    weights: ModelConfig | None = None,
    training: bool = False,
    gradients: Gradients = "stream",
) -> Measured:
    """BATCH sequences of Zipf-distributed tokens through one model, and the gradient of their mean loss back.

    `weights`: the config whose initial values are taken, None for `config`; `training`: with dropout; `gradients`:
    what they are computed of, of the rest they are nan. Tests of one process share the results.
    """
    return _kept(config, seed, weights, training, gradients)


def measure_anew(
    config: ModelConfig,
    seed: int,
    weights: ModelConfig | None = None,
    training: bool = False,
    gradients: Gradients = "stream",
) -> Measured:
    """As `measure`, but never what was measured before."""
    assert config.max_seq_len is not None
    decoder = make_decoder(config, seed, weights).train(training).requires_grad_(gradients == "all")
    tokens = zipf_tokens(BATCH, config.max_seq_len + 1, seed)
    watch = _Watch(decoder, gradients != "none")
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients != "none"):
        torch.manual_seed(seed)
        sums = decoder(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(sums, LossSums)
    if gradients != "none":
        (sums.total / sums.valid).backward()
    attention, feedforward = watch.branches[0::2], watch.branches[1::2]
    return Measured(
        stream_variance=np.array(watch.variances),
        token_correlation=np.array(watch.correlations),
        attention_branch_variance=np.array([math.nan, *attention]),
        feedforward_branch_variance=np.array([math.nan, *feedforward]),
        gradient_norm=np.sqrt(watch.squares),
        weight_gradient_norm=np.array([math.nan, *_weight_gradient_norms(decoder)]),
        loss=(sums.cross_entropy / sums.valid).item(),
        collision=collision(tokens[:, :-1]),
    )


_kept = lru_cache(maxsize=128)(measure_anew)


def _weight_gradient_norms(decoder: Decoder) -> list[float]:
    """Norm of the gradients of each layer's matrices together; nan where there are none."""
    norms = []
    for layer in decoder.layers:
        gradients = [p.grad for p in layer.parameters() if p.ndim == 2 and p.grad is not None]
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)) if gradients else math.nan)
    return norms


class _Watch:
    """Collects what flows past layer boundaries and out of branches; keeps numbers, no tensors."""

    def __init__(self, decoder: Decoder, gradients: bool):
        self.variances: list[float] = []
        self.correlations: list[float] = []
        self.branches: list[float] = []
        self.gradients = gradients
        self.squares = np.full(len(decoder.layers) + 1, 0.0 if gradients else math.nan)
        # A dense stream carries old outputs behind the stream itself.
        self.parts = None if decoder.config.stream == "concat" else 1
        decoder.tap = self._tap
        for layer in decoder.layers:
            for sublayer in (layer.attention, layer.feedforward):
                sublayer.dropout.register_forward_hook(self._branch)  # type: ignore[union-attr]

    def _tap(self, index: int, chunks: Chunks) -> Chunks:
        if self.gradients:
            if index == 0:
                chunks = tuple(x.detach().requires_grad_() for x in chunks)
            chunks = tuple(x.view_as(x) for x in chunks)
            for x in chunks[: self.parts]:
                x.register_hook(self._adder(index))
        stream = torch.cat([x.detach() for x in chunks[: self.parts]], dim=-1)
        self.variances.append(stream.double().square().mean().item())
        self.correlations.append(token_correlation(stream))
        return chunks

    def _adder(self, index: int) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            self.squares[index] += gradient.double().square().sum().item()

        return add

    def _branch(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.branches.append(output.detach().double().square().mean().item())


def average(measured: Sequence[Measured]) -> Measured:
    """Means over seeds; geometric for gradient norms, whose spread is that of a product over depth."""
    means = {f.name: np.mean([getattr(m, f.name) for m in measured], axis=0) for f in fields(Measured)}
    for name in ("gradient_norm", "weight_gradient_norm"):
        means[name] = np.exp(np.mean([np.log(getattr(m, name)) for m in measured], axis=0))
    return replace(measured[0], **means)
