"""A model as plain weights: all that multiplies its stream, branches, norms, tables and logits is in them.

With c_0 to be chosen and c_{s+1} = skip_s c_s over the sub-layers s, the stream x_s of x <- skip x + branch f(x) is
c_s y_s, where y_{s+1} = y_s + (branch_s / c_{s+1}) f(c_s y_s). A norm in front of f takes c_s out again, but for its
eps, which it sees as eps / c_s^2. The architectures that are written have one eps for all norms, so where the skips
differ from 1, c_0 is chosen such that the largest |c_s^2 - 1| is smallest: to first order a norm's output is off by the
share (c_s^2 - 1) eps / (2 v), v being the mean square of what it reads. The average of that over the tokens of
`calibrated` is taken back by the norm's gain. All other folds are exact; they are computed in float64 and rounded once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.export.calibration import NormInput, norm_inputs
from stablelm.export.weights import LazyTensor, Weights, constant, unrolled
from stablelm.methods import catalogue
from stablelm.methods.sizes import d_head

ROUNDING = 1e-9
"""Relative: what is equal but for it."""
BLOCK = 4096
"""Rows of a table that are changed at once."""


@dataclass(frozen=True)
class Affine:
    """What multiplies and what is added: a matrix (d_out, d_in) or a norm's gain (width,), and its bias."""

    weight: LazyTensor
    bias: LazyTensor | None = None

    def times(self, factor: float) -> "Affine":
        """Both multiplied."""
        return Affine(self.weight.times(factor), None if self.bias is None else self.bias.times(factor))

    def of_features(self, scale: Tensor | None) -> "Affine":
        """Each feature of what it makes multiplied by its own factor, (d_out,); None: nothing."""
        if scale is None:
            return self
        weight = self.weight.map(lambda x: x.mul_(scale if x.ndim == 1 else scale[:, None]))
        return Affine(weight, None if self.bias is None else self.bias.map(lambda x: x.mul_(scale)))


@dataclass(frozen=True)
class FoldedLayer:
    """A layer: y <- y + output(attention(norm_attention y)), then y <- y + down(act(gate h) * up h) of h =
    norm_feedforward y.

    `query` includes what multiplies the logits beyond d_head^-1/2, or `norm_query` does where there is one; `gate` is
    None for down(act(up h)). `after_attention` and `after_feedforward`: norms on the branches, which take their scale.
    """

    norm_attention: Affine
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    norm_feedforward: Affine
    up: Affine
    gate: Affine | None
    down: Affine
    norm_query: LazyTensor | None
    norm_key: LazyTensor | None
    after_attention: Affine | None
    after_feedforward: Affine | None


class Folded:
    """The folded weights of a model, each made when it is asked for.

    With `centre`, layer norms without biases become root-mean-square norms, which is exact where all that is written to
    the stream has mean zero, as it then has: means are taken out of the tables and of the output maps. Only where
    `obstacles` is empty is the rest of use. Shared layers are written at each of their places.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        *,
        centre: bool = False,
        norm_inputs: Sequence[NormInput] = (),
    ):
        model, weights = unrolled(model, weights)
        self.model, self.weights, self.centre, self._norm_inputs = model, weights, centre, norm_inputs
        self.d_head = d_head(model)

    @property
    def is_exact(self) -> bool:
        """Whether only rounding makes a difference: no norm sees another eps."""
        low, high = min(self._eps_ratios), max(self._eps_ratios)
        return high - low <= ROUNDING * high

    @property
    def largest_error(self) -> float:
        """The largest share by which the output of a norm is off for a token of `calibrated`, to first order."""
        inputs, eps = self._norm_inputs, self.model.norm_eps
        pairs = zip(self.scales, inputs, strict=bool(inputs))
        return max((abs(c**2 - 1) * eps / 2 * (1 / each.least - 1 / each.mean) for c, each in pairs), default=0.0)

    def calibrated(self, tokens: Tensor) -> "Folded":
        """With norms whose gains make up for their eps as these tokens need it, (batch, seq) int64.

        The model is run, one layer in memory at a time.
        """
        if self.is_exact:
            return self
        found = norm_inputs(self.model, self.weights, tokens)
        return Folded(self.model, self.weights, centre=self.centre, norm_inputs=found)

    @property
    def with_rms_norms(self) -> "Folded":
        """The same function with root-mean-square norms, for layer norms without biases and none on the branches."""
        centre = self.model.axes.norm.standard == "layer"
        return Folded(self.model, self.weights, centre=centre, norm_inputs=self._norm_inputs)

    @cached_property
    def obstacles(self) -> list[str]:
        """Why no standard architecture of pre-norm layers computes the model, whatever its sizes."""
        model, placement, found = self.model, self.model.axes.placement, catalogue.export_obstacles(self.model)
        where = f"model.placement={placement.name}"
        if not (placement.final and all(at.before_body for at in placement.used())):
            found.append(f"{where} leaves out norms that every standard architecture has")
        if any(at.before_output for at in placement.used()):
            found.append(f"{where} has a norm inside its sub-layers, in front of their last matrix")
        if any(at.after_write for at in placement.used()):
            found.append(f"{where} has norms on the stream itself")
        if model.axes.norm.standard is None:
            found.append(f"model.norm={model.axes.norm.name} is in no standard architecture")
        if model.axes.activation.standard is None:
            found.append(f"model.activation={model.axes.activation.name} is in no standard architecture")
        if model.axes.position.standard is None:
            found.append(f"model.attention.position={model.axes.position.name} is in none of the formats")
        if not found and not all(skip > 0 for skip, _ in self.gains):
            found.append("its skips are not positive, so that they cannot be divided out")
        if model.embedding_norm and model.axes.position.adds_table:
            found.append("model.embedding_norm normalises the sum of a token's and a position's embedding")
        return found

    @cached_property
    def gains(self) -> list[tuple[float, float]]:
        """(skip, branch) of each sub-layer."""
        model, stream, found = self.model, self.model.axes.stream, []
        for sublayer in range(2 * model.n_layers):
            stem = _stem(sublayer)
            names = [each.name for each in stream.in_sublayer(model, sublayer)]
            added = {name: self.weights.read(f"{stem}.{name}").double() for name in names}
            skip, branch = stream.trained_gains(model, sublayer, added)
            found.append((skip, branch * model.axes.depth_drop.evaluated(model, sublayer)))
        return found

    def _branch_scale(self, sublayer: int) -> Tensor | None:
        """What multiplies each feature of a branch beside its gain, (width,) float64; None: nothing."""
        stream, stem = self.model.axes.stream, _stem(sublayer)
        names = [each.name for each in stream.in_sublayer(self.model, sublayer)]
        return stream.trained_scale({name: self.weights.read(f"{stem}.{name}").double() for name in names})

    @cached_property
    def scales(self) -> list[float]:
        """c_s of each sub-layer and, last, of the end."""
        scales = [1.0]
        for skip, _ in self.gains:
            scales.append(scales[-1] * skip)
        low, high = min(ratios := self._ratios(scales)), max(ratios)
        first = math.sqrt(2 / (low**2 + high**2)) if high - low > ROUNDING * high else 1.0
        return [first * scale for scale in scales]

    @property
    def _eps_ratios(self) -> list[float]:
        return self._ratios(self.scales)

    def _ratios(self, scales: Sequence[float]) -> list[float]:
        """c_s by the root of what multiplies the eps of the norm at sub-layer s: 1 where no norm sees another eps."""
        stream, model = self.model.axes.stream, self.model
        return [scale / math.sqrt(stream.eps_scale(model, index)) for index, scale in enumerate(scales)]

    @property
    def tied(self) -> bool:
        """Whether the head is the token table."""
        return bool(self.model.tie_embeddings) and not self.centre and not self.model.embedding_norm

    def embedding(self) -> LazyTensor:
        """The token table (vocab_size, d_model): what the stream starts with, but for positions."""
        table = self.weights.lazy("embedding.weight")
        if not self.model.embedding_norm:
            return self._centred(table.times(self._embedding_scale), dim=-1)
        affine = self._norm("norm_embedding")
        alpha = self.weights.optional("norm_embedding.alpha")
        scale = self.model.axes.init.embedding_scale(self.model)
        norm, eps, first = self.model.axes.norm, self.model.norm_eps, self.scales[0]

        def normed(table: Tensor) -> Tensor:
            gain = affine.weight.values()
            bias, slope = (None if each is None else each.values() for each in (affine.bias, alpha))
            for rows in table.split(BLOCK):
                rows.copy_(norm.apply(rows * scale, gain, bias, slope, eps).div_(first))
            return table

        return self._centred(table.map(normed), dim=-1)

    def positions(self) -> LazyTensor:
        """The table of positions (max_seq_len, d_model); zeros where the causal mask alone gives the order."""
        model = self.model
        assert model.max_seq_len is not None
        if not model.axes.position.adds_table:
            return constant((model.max_seq_len, model.d_model), 0.0)
        return self._centred(self.weights.lazy("position.weight").times(1 / self.scales[0]), dim=-1)

    def head(self) -> LazyTensor:
        """The matrix of an untied head, (vocab_size, d_model), with its multiplier."""
        name = "embedding.weight" if self.model.tie_embeddings else "head.weight"
        return self.weights.lazy(name).times(self.model.axes.init.head_scale(self.model))

    def final_norm(self) -> Affine:
        """The norm in front of the head; of a tied head it takes the multiplier, and undoes that of the table."""
        found = self._norm("norm_final", 2 * self.model.n_layers)
        if not self.tied:
            return found
        return found.times(self.model.axes.init.head_scale(self.model) / self._embedding_scale)

    @property
    def _embedding_scale(self) -> float:
        return self.model.axes.init.embedding_scale(self.model) / self.scales[0]

    def layer(self, index: int) -> FoldedLayer:
        """A layer, counted from 0."""
        model, feedforward = self.model, 2 * index + 1
        norm_in, (query, key, value) = self._first(2 * index, ("query", "key", "value"))
        names = ("fc1", "gate") if model.axes.activation.gated else ("fc1",)
        norm_feedforward, maps = self._first(feedforward, names)
        output, after_attention = self._last(2 * index, "output")
        down, after_feedforward = self._last(feedforward, "fc2")
        scale = model.axes.init.logit_scale(self.d_head) * math.sqrt(self.d_head)
        stem = f"{_stem(2 * index)}.body"
        norm_query = self.weights.optional(f"{stem}.norm_query.weight")
        return FoldedLayer(
            norm_attention=norm_in,
            query=query.times(scale) if norm_query is None else query,
            key=key,
            value=value,
            output=output,
            norm_feedforward=norm_feedforward,
            up=maps[0],
            gate=maps[1] if len(maps) > 1 else None,
            down=down,
            norm_query=None if norm_query is None else norm_query.times(scale),
            norm_key=self.weights.optional(f"{stem}.norm_key.weight"),
            after_attention=after_attention,
            after_feedforward=after_feedforward,
        )

    def _first(self, sublayer: int, names: tuple[str, ...]) -> tuple[Affine, list[Affine]]:
        """The norm in front of a sub-layer, and the maps that read it."""
        norm = self._norm(f"{_stem(sublayer)}.norm_in", sublayer)
        norm = norm.times(self.model.axes.placement.input_scale(sublayer // 2))
        return norm, [self._map(sublayer, name) for name in names]

    def _last(self, sublayer: int, name: str) -> tuple[Affine, Affine | None]:
        """The map at a sub-layer's end and the norm on its branch, one of which takes the branch's scale."""
        scale, features = self.gains[sublayer][1] / self.scales[sublayer + 1], self._branch_scale(sublayer)
        found = self._map(sublayer, name)
        if self.model.axes.placement.at(self.model, sublayer).on_branch:
            return found, self._norm(f"{_stem(sublayer)}.norm_branch").times(scale).of_features(features)
        found = found.times(scale).of_features(features)
        bias = None if found.bias is None else self._centred(found.bias, dim=0)
        return Affine(self._centred(found.weight, dim=0), bias), None

    def _map(self, sublayer: int, name: str) -> Affine:
        stem = f"{_stem(sublayer)}.body.{name}"
        bias = self.weights.optional(f"{stem}.bias") or self.weights.optional(f"{stem}.up.bias")
        return Affine(self.weights.matrix(stem, self.model, sublayer), bias)

    def _norm(self, stem: str, reads: int | None = None) -> Affine:
        """A norm; `reads`: the sub-layer in front of which it reads the stream."""
        found = Affine(self.weights.lazy(f"{stem}.weight"), self.weights.optional(f"{stem}.bias"))
        if reads is None or not self._norm_inputs:
            return found
        # The norm divides by sqrt(v + c^2 eps) of what x is, not by sqrt(v + eps).
        size, eps, scale = self._norm_inputs[reads].mean, self.model.norm_eps, self.scales[reads]
        own = eps * self.model.axes.stream.eps_scale(self.model, reads)
        return Affine(found.weight.times(math.sqrt((size + scale**2 * eps) / (size + own))), found.bias)

    def _centred(self, tensor: LazyTensor, *, dim: int) -> LazyTensor:
        """Without its mean over d_model, if norms are to be root-mean-square norms."""
        return tensor.map(lambda x: x.sub_(x.mean(dim=dim, keepdim=True))) if self.centre else tensor


def _stem(sublayer: int) -> str:
    return f"layers.{sublayer // 2}.{'feedforward' if sublayer % 2 else 'attention'}"
