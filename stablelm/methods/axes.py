"""The axes of the method space, and what a value of each must answer.

A method's file defines the values that it introduces as frozen dataclasses derived from these, and its `Method`. All
other code calls their methods and never compares names. Every answer has the default of the plain pre-norm model, so
that a value says only what it changes. Importing a method must not import torch: what computes imports it where it is
called.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from stablelm.methods.roles import (
    BRANCH_MATRICES,
    MATRICES,
    TABLES,
    Added,
    Array,
    Rates,
    Refusal,
    Role,
    Widths,
    added_map,
)
from stablelm.theory.attention import Pattern, causal_pattern
from stablelm.theory.gates import GateTheory
from stablelm.theory.kernels import NormTheory
from stablelm.theory.moments import Function, causal_means
from stablelm.theory.sensitivity import joined_shares, sensitivity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Chunks = tuple[Tensor, ...]

__all__ = ["BRANCH_MATRICES", "MATRICES", "TABLES", "Added", "Rates", "Refusal", "Role", "Widths", "added_map"]

Options = TypeVar("Options", bound="MethodOptions")
M = TypeVar("M", bound="Model")
A = TypeVar("A", bound="Activation")


class AttentionKeys:
    """The section `model.attention`, its None values filled in."""

    rope_base: float
    qk_norm: bool | None
    logit_cap: float | None
    value_residual: bool | None
    low_rank: float | None
    value_maps: bool | None

    def changed(self, **changes: Any) -> Any:
        """A copy with other values."""
        raise NotImplementedError


class Model:
    """The section `model` of a configuration, as far as methods read it; its axes are filled in."""

    method: str
    n_layers: int
    d_model: int
    n_heads: int
    kv_heads: int | None
    d_ff: int | None
    max_seq_len: int | None
    vocab_size: int | None
    dropout: float
    tie_embeddings: bool | None
    embedding_norm: bool | None
    embedding_gradient_scale: float
    norm_eps: float
    norm_alpha: float
    bias: bool | None
    attention: AttentionKeys
    axes: "Axes"

    def option(self, kind: type[Options]) -> Options:
        """The options of a method, its own section of the configuration."""
        raise NotImplementedError

    def changed(self: M, *options: Any, **changes: Any) -> M:
        """A copy with other values; each of `options` replaces the section of its type."""
        raise NotImplementedError


class Value:
    """What every axis value answers."""

    name: ClassVar[str]
    predicted: ClassVar[bool] = True
    """Whether the theory knows what it does to signals at the start, as far as there is no `theory_gap`."""

    earlier: ClassVar[Mapping[str, Any]] = {}
    """What runs with it had in keys of the configuration that they do not name, where that is no default any more."""

    def theory_gap(self, model: Model) -> str | None:
        """The assumption that the theory lacks in this model; None: it knows the model's signals at the start."""
        return None if self.predicted else f"what {self.name} does to signals at the start is not known"

    def in_attention(self, model: Model, layer: int) -> tuple[Added, ...]:
        """Parameters that the body of a layer's attention gets; what computes there takes them by name."""
        return ()

    def asked(self, model: Model) -> bool:
        """Whether the keys ask for it, on the axes whose values no key names: value mixing and maps."""
        return False

    def refusals(self, model: Model) -> Iterable[Refusal]:
        """The combinations with this value that make no sense."""
        return ()

    def modelling(self, model: Model) -> dict[str, Any] | None:
        """Settings with which our own modelling file for transformers computes the same, beside those that follow from
        other answers (`export.hf_model`); None: it does not know how."""
        return {}

    def export_obstacle(self, model: Model) -> str | None:
        """Why no standard architecture computes the same function, or None if one does."""
        return None

    def cache_obstacle(self, model: Model) -> str | None:
        """Why the keys and values of earlier tokens cannot be kept while text is generated, or None if they can.

        They can where nothing that was computed for a token changes with later tokens or with the length of the text.
        """
        return None

    def import_obstacle(self, model: Model) -> str | None:
        """Why no weights make it compute what a plain pre-norm model computes, or None if some do."""
        return None


@dataclass(frozen=True)
class Stream(Value):
    """What flows from layer to layer and how a branch joins it: x <- skip x + branch f(x) by default.

    The stream is a tuple of tensors, each (batch, seq, width), and never changed in place, so that recompute and
    sharding engines may run any layer again from its inputs. A layer returns only tensors that it made itself (engines
    hook the outputs of a layer); `join(before, new)` returns the stream after it.
    """

    skip: float = 1.0
    branch: float = 1.0

    grows: ClassVar[bool] = False
    """Whether sub-layers have widths of their own (`widths`), and the end is projected back to d_model."""
    has_skip: ClassVar[bool] = True
    """Whether there is a skip connection."""
    dual: ClassVar[bool] = False
    """Whether the head reads x + norm(d), d being the embedding and every branch, summed, for the theory."""
    parallel: ClassVar[bool] = False
    """Whether the feed-forward reads what the attention of its layer reads, and writes onto what it wrote."""
    layers_differ: ClassVar[bool] = False
    """Whether layers differ in more than their parameters' values, so that they cannot share a compiled graph."""
    normed: ClassVar[int | None] = None
    """How many of the tensors that `write` returns the norm after the sub-layer takes, the first ones; None: all."""

    def at(self, model: Model, sublayer: int | None = None) -> "Stream":
        """The stream with the gains of this model, or as one sub-layer reads and writes it."""
        skip, branch = self.gains(model) if sublayer is None else self.gains_in(model, sublayer)
        return replace(self, skip=skip, branch=branch)

    def gains(self, model: Model) -> tuple[float, float]:
        """(skip, branch) of x <- skip x + branch f(x)."""
        return 1.0, 1.0

    def gains_in(self, model: Model, sublayer: int) -> tuple[float, float]:
        """`gains` of a sub-layer, where they differ between these."""
        return self.gains(model)

    def modelling(self, model: Model) -> dict[str, Any] | None:
        plain = Stream.export_obstacle(self, model) is None and type(self).write is Stream.write
        return {} if plain else None

    def widths(self, model: Model, sublayer: int) -> Widths:
        """The widths of a sub-layer, counted from 0 over both kinds; 2 n_layers is the end of the stream."""
        return Widths(model.d_model, model.d_model, model.d_model)

    def sized(self, model: M) -> M:
        """The model with the widths that are None filled in."""
        return model if model.d_ff is not None else model.changed(d_ff=model.axes.activation.d_ff(model.d_model))

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """Parameters that each sub-layer gets; `read` and `write` take them by name, matrices in the compute dtype."""
        return ()

    def in_layer(self, model: Model, layer: int) -> tuple[Added, ...]:
        """Parameters that each layer gets; `end_layer` takes them by name, matrices in the compute dtype."""
        return ()

    def multiplications(self, model: Model, sublayer: int) -> int:
        """Of a token in matrix products of the stream, beside one with each entry of an added map."""
        return 0

    def branch_at_start(self, model: Model) -> float:
        """`branch` with every added parameter at its start, for the theory."""
        return self.gains(model)[1]

    def gains_at_start(self, model: Model, sublayer: int) -> tuple[float, float]:
        """(skip, branch) of a sub-layer with every added parameter at its start, for the theory."""
        return self.gains_in(model, sublayer)[0], self.branch_at_start(model)

    def gate(self, model: Model) -> GateTheory | None:
        """What takes the place of the sum of skip and branch, for the theory; None: nothing does."""
        return None

    def sensitivity(self, model: Model, variances: Array, matrices: Array, embedding_variance: float) -> float | None:
        """Of the stream at the end (`theory.sensitivity`), from the variances of the branches as written, before their
        scale, and how many matrices each counts with, (2 n_layers,) both. None: not known."""
        shares = self.sensitivity_shares(model, variances, embedding_variance)
        return None if shares is None else sensitivity(shares, matrices)

    def sensitivity_shares(self, model: Model, variances: Array, embedding_variance: float) -> Array | None:
        """The part of the stream's variance that each branch contributes where it joins, (2 n_layers,), at the start.

        `variances`: of the branches as written, before their scale. None: not known.
        """
        if not self.predicted or self.gate(model) is not None:
            return None
        places = range(len(variances))
        gains = [
            (skip, branch * model.axes.depth_drop.root_mean_square(model, index))
            for index, (skip, branch) in ((index, self.gains_at_start(model, index)) for index in places)
        ]
        normed = [model.axes.placement.at(model, index).after_write for index in places]
        shares = joined_shares(variances, gains, normed, embedding_variance)
        if self.parallel:  # what a feed-forward reads has nothing of its layer's attention
            shares[::2] *= 1 - shares[1::2]
        return shares

    def plain_value(self, added: Added) -> Array:
        """The value of an added parameter with which the stream is x <- skip x + branch f(x)."""
        return added.start

    def eps_scale(self, model: Model, sublayer: int) -> float:
        """What multiplies `norm_eps` in the norm before a sub-layer; 2 n_layers is the final norm."""
        return 1.0

    def for_import(self, model: M) -> M:
        """The model with the options of the stream under which a plain model's weights fit exactly."""
        return model

    def import_obstacle(self, model: Model) -> str | None:
        if self.grows:
            return "its sub-layers read a concatenation, which a plain model's matrices do not fit"
        return None if self.has_skip else "it has no skip, and a plain model has one"

    def start(self, embedded: "Tensor") -> "Chunks":
        """The stream that holds the embeddings alone."""
        return (embedded,)

    def read(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        """The input of a sub-layer, before any norm."""
        return chunks[0]

    def separate_inputs(self, model: Model, sublayer: int) -> bool:
        """Whether each of a sub-layer's first maps has an input and a norm of its own."""
        return False

    def read_each(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        """The input of each first map where these are separate: of query, key and value, or of fc1 and a gate."""
        raise NotImplementedError

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        """The new tensors that a sub-layer's branch makes of the stream, in the stream's dtype."""
        from stablelm.methods.kernels import weighted_sum

        x = chunks[0]
        if self.skip == 0:
            return (branch.to(x.dtype) * self.branch,)
        return (weighted_sum(x, branch, self.skip, self.branch),)

    def join(self, chunks: "Chunks", new: "Chunks") -> "Chunks":
        """The stream after `new` was written onto `chunks`."""
        return new

    def end_layer(self, chunks: "Chunks", new: "Chunks", added: Mapping[str, "Tensor"]) -> "Chunks":
        """What a layer returns; `chunks`: the stream before it, `new`: what both sub-layers made."""
        return new

    def settle(self, chunks: "Chunks") -> "Chunks":
        """The same stream in fewer tensors, between layers."""
        return chunks

    def state(self, chunks: "Chunks") -> "Chunks":
        """The tensors whose variance and correlation are the stream's: what a sub-layer reads."""
        return chunks[:1]

    def state_gradient(self, gradients: "Chunks") -> "Chunks":
        """The gradient to `state`, from those to all chunks, where changing it changes every chunk made of it."""
        return self.state(gradients)

    def finish(self, chunks: "Chunks") -> "Tensor":
        """What the final norm and the head see."""
        return chunks[0]

    def end(self, chunks: "Chunks", norm: "Callable[[Tensor], Tensor] | None") -> "Tensor":
        """What the head sees; `norm`: the final one, None where there is none."""
        x = self.finish(chunks)
        return x if norm is None else norm(x)

    def trained_gains(self, model: Model, sublayer: int, added: "Mapping[str, Tensor]") -> tuple[float, float]:
        """(skip, branch) of a trained sub-layer, for export: x <- skip x + branch f(x).

        `added`: its own parameters by name. A value that overrides `write` overrides this, or cannot be exported.
        """
        return self.gains_in(model, sublayer)

    def trained_scale(self, added: "Mapping[str, Tensor]") -> "Tensor | None":
        """What multiplies each feature of a trained branch besides, (width,), for export; None: nothing."""
        return None

    def export_obstacle(self, model: Model) -> str | None:
        kind = type(self)
        kept = all(getattr(kind, name) is getattr(Stream, name) for name in ("start", "read", "join", "end_layer"))
        kept = kept and all(getattr(kind, name) is getattr(Stream, name) for name in ("settle", "finish", "end"))
        if kept and (kind.write is Stream.write or kind.trained_gains is not Stream.trained_gains):
            return None
        return f"model.stream={self.name} is not a sum of a skip and a branch, as every standard architecture's is"


@dataclass(frozen=True)
class Placement(Value):
    """The places of norms.

    `before_body`: on what the sub-layer reads; `before_output`: inside the body, before its last matrix (over all
    heads together, or after the activation); `on_branch`: on the body's output; `after_write`: on the stream after
    the sub-layer; `final`: before the head; `by_depth`: the norm before the body is divided by sqrt(layer from 1).
    A value whose places differ between sub-layers says so in `at`; its own fields are then those of most of them.
    """

    layers_differ: ClassVar[bool] = False
    """Whether layers have norms at different places, so that they cannot share a compiled graph."""

    name: str  # type: ignore[misc]
    before_body: bool = False
    before_output: bool = False
    on_branch: bool = False
    after_write: bool = False
    final: bool = False
    by_depth: bool = False

    def at(self, model: Model, sublayer: int) -> "Placement":
        """The places in a sub-layer, counted from 0 over both kinds."""
        return self

    def used(self) -> "tuple[Placement, ...]":
        """The places that `at` gives, from the first layers to the last."""
        return (self,)

    def input_scale(self, layer: int) -> float:
        """What multiplies the norm before the body of a layer, counted from 0."""
        return 1 / math.sqrt(layer + 1) if self.by_depth else 1.0

    def mixed(self, heads: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        """Values averaged by attention, (batch, seq, heads, d_head), on their way to the output map."""
        return heads

    def export_obstacle(self, model: Model) -> str | None:
        if self.in_attention(model, 0):
            return f"model.placement={self.name} scales its heads, which no standard architecture does"
        return None

    def import_obstacle(self, model: Model) -> str | None:
        each = self.used()
        if any(at.after_write or at.on_branch or at.before_output for at in each):
            return "it has norms where a plain model has none, and a norm undoes any scale of the weights"
        if not (self.final and all(at.before_body for at in each)):
            return "it lacks norms that a plain model has before each sub-layer and at the end"
        return None


class NormKind(Value):
    """A norm over the last dimension."""

    has_bias: ClassVar[bool] = True
    """Whether it has a bias where the model has biases."""
    has_gain: ClassVar[bool] = True
    """Whether it has a learned gain for each feature."""
    has_slope: ClassVar[bool] = False
    """Whether it has a learned slope `alpha` (1,), which starts at `slope`."""
    wide_inside: ClassVar[bool] = False
    """Whether `apply` computes in at least fp32 whatever the dtype of x, its weight and its bias."""
    standard: ClassVar[str | None] = None
    """What standard architectures know it as, for export: `layer`, mean and variance divided out, or `rms`, the root
    mean square alone; None: they have none that computes the same. A subclass that computes something else sets its
    own."""

    def apply(self, x: "Tensor", weight: Any, bias: "Tensor | None", alpha: Any, eps: float) -> "Tensor":
        """x: (..., width) -> the same shape and dtype: the parameters', or a lower one if `wide_inside`; `weight`:
        (width,) if `has_gain`, `alpha`: (1,) if `has_slope`."""
        raise NotImplementedError

    def start(self, value: "Tensor", dim: int) -> "Tensor":
        """Initial values of a table or of a matrix that writes onto the stream, whose features are along `dim`."""
        return value

    def slope(self, model: Model, attention: bool) -> float:
        """Start of `alpha`, of a norm in an attention sub-layer or elsewhere."""
        return model.norm_alpha

    def embedding_gain(self, model: Model) -> float | None:
        """Start of a learned factor (1,) of the token embeddings that goes with it; None: there is none."""
        return None

    def theory(self, model: Model, scale: float = 1.0) -> NormTheory:
        """Its action on token kernels; of one with a slope, outside attention sub-layers."""
        raise NotImplementedError

    def variance(self, model: Model, variance: float, attention: bool) -> float:
        """Second moment of its output per feature, from that of its input, in an attention sub-layer or elsewhere."""
        return 1.0

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return None if self.standard is None else {"norm_centred": self.standard == "layer"}


@dataclass(frozen=True)
class Init(Value):
    """The stds of initial values, the scales that belong to them, and how learning rates follow.

    The defaults: tables and head of std d_model^-1/2, nothing scaled, the configured rates.
    """

    sizes_branches: ClassVar[bool] = False
    """Whether it sets the size of a branch by the size of its matrices, which a spectral norm of 1 undoes."""
    solved: ClassVar[bool] = False
    """Whether stds are solved such that each branch has variance 1 after its dropout."""
    unit_length: ClassVar[bool] = False
    """Whether matrices and tables start with length 1 along the embedding dimension."""
    unit_variance: ClassVar[bool] = False
    """Whether embeddings and activations have variance 1, as the activation `tailored` assumes."""

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """Of a matrix of the layers, (fan_out, fan_in)."""
        raise NotImplementedError

    def embedding_std(self, model: Model) -> float:
        """Of the token and position tables."""
        return unit_embedding_std(model) if self.unit_variance else model.d_model**-0.5

    def embedding_scale(self, model: Model) -> float:
        """What multiplies the token embeddings."""
        return 1.0

    def head_std(self, model: Model) -> float:
        """Of an untied head."""
        return model.d_model**-0.5

    def head_scale(self, model: Model) -> float:
        """What multiplies the head's input.

        For a tied head of unit-variance embeddings 1 / (std sqrt(d)), which gives unit logits (Kedia et al. 2024,
        released code).
        """
        if model.tie_embeddings and self.unit_variance:
            return 1 / (self.embedding_std(model) * math.sqrt(model.d_model))
        return 1.0

    def logit_scale(self, d_head: int) -> float:
        """What multiplies query . key."""
        return d_head**-0.5

    def rates(self, model: Model, *, in_layer: bool, matrix: bool) -> Rates:
        """Multipliers for one parameter: in or outside the layers, a matrix or a vector."""
        return Rates()

    def starts_at_zero(self, kind: str) -> bool:
        """Whether matrices of that kind start at zero."""
        return False

    def draw_variance(self, d_out: int, d_in: int) -> float:
        """Relative variance of |W x|^2 between draws of a map W, (d_out, d_in): of Gaussian entries, 2 / d_out."""
        return 2 / d_out

    def partner(self, kind: str) -> str | None:
        """The matrix of the same body whose draws `shaped` gets, too; its shape is the transposed one."""
        return None

    def shaped(self, kind: str, gaussian: "Tensor", partner: "Tensor | None" = None) -> "Tensor | None":
        """A matrix made of standard normal draws in another way than by a std; None: by `std`."""
        return None


def unit_embedding_std(model: Model) -> float:
    """Of tables whose sum has variance 1 after dropout: (1 - dropout) / tables is the variance (Kedia et al. 2024)."""
    return math.sqrt((1 - model.dropout) / (2 if model.axes.position.adds_table else 1))


class Reparam(Value):
    """What a matrix of the layers stands for: itself unless a value says otherwise."""

    after_step: ClassVar[bool] = False
    """Whether `update` runs after each optimizer step."""
    replaces: ClassVar[bool] = False
    """Whether another matrix takes the place of the one that was drawn, by `split` in place of `starts`."""
    scale_free: ClassVar[bool] = True
    """Whether the function does not depend on the size of its matrices, which therefore have no decay."""
    tables: ClassVar[bool] = False
    """Whether it applies to the token table and to an untied head too."""

    def applies(self, model: Model, sublayer: int) -> bool:
        """Whether it applies to the matrices of a sub-layer."""
        return False

    def parameters(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that stand beside each of its matrices."""
        return {}

    def buffers(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers beside each of its matrices, in the parameters' dtype."""
        return {}

    def derived(self) -> dict[str, tuple[int, ...]]:
        """Shapes of buffers beside each of its matrices that follow from the weight and the others, by `derive`.

        They are no part of checkpoints.
        """
        return {}

    def derive(self, matrices: Sequence[Any], reduce: Any) -> None:
        """Fills `derived` when weights were set from outside; arguments and collectives as of `update`.

        `update` has to leave in them, to the last bit, what this would.
        """

    def starts(self, weight: "Tensor", model: Model, top: Any) -> "dict[str, Tensor]":
        """Initial values of those parameters and buffers; `top` finds the weight's largest singular value.

        When another rank computes this matrix's singular vectors, `top` returns zeros; every value must then be zero
        too, because the ranks' results are summed.
        """
        return {}

    def split(self, weight: "Tensor", model: Model, std: float | None) -> "dict[str, Tensor]":
        """If `replaces`: initial values in float32 of those parameters and buffers, and of `weight` in its place.

        `std`: with which the weight was drawn, None for one that was not.
        """
        raise NotImplementedError

    def factor(self, linear: Any) -> "Tensor | None":
        """What multiplies the rows of a matrix, (1,) or (d_out,); None: nothing. `linear`: `model.linear.Linear`.

        The gradient passes through it. It must have no side effects: recompute calls it twice.
        """
        return None

    def quotient(self, linear: Any) -> "tuple[Tensor, Tensor, Tensor, Tensor] | None":
        """(gain, sigma, v, u), (1,) twice, (d_out,), (d_in,), if `factor` is gain / sigma with sigma = v^T W u.

        v and u are constant. Then its gradient needs no matrix beside the weight's gradient. None: it is differentiated
        as it is written.
        """
        return None

    def entry_variance(self, model: Model, std: float, shape: tuple[int, int]) -> float:
        """Variance of the entries of a map (d_out, d_in) as it acts at the start, for a matrix of that std."""
        return std**2

    def keeps_start(self, model: Model) -> bool:
        """Whether a matrix at the start stands for itself, whatever it is."""
        return True

    def import_obstacle(self, model: Model) -> str | None:
        if not self.keeps_start(model):
            return "it changes the size of every matrix at the start; leave the start of its gain as it is"
        return None

    def update(self, matrices: Sequence[Any], reduce: Any) -> "list[Tensor] | None":
        """What is done after the optimizer step, for the parts of all its matrices that a rank holds.

        `matrices`: `methods.spectral.Matrix` or `Slice`; `reduce` sums a flat tensor over the ranks in place, None if
        each holds whole matrices. Buffers are changed in place; factors that are returned, one (1,) or (d_out,) for
        each matrix, multiply its rows, (1, d_in) its columns, in the optimizer's own copy too.
        """
        return None


class Activation(Value):
    """The feed-forward's nonlinearity."""

    gated: ClassVar[bool] = False
    """Whether it has a gate: act(gate x) * fc1 x."""
    keeps_variance: ClassVar[bool] = False
    """Whether its output has the variance of its input."""
    scales_evenly: ClassVar[bool] = False
    """Whether the std of fc1 and fc2 may be shared, see `methods.solve`."""
    standard: ClassVar[str | None] = None
    """The name of the pointwise function, of the gate if `gated`, in `hidden_act` of transformers' configurations, for
    export; None: there is none. A subclass that computes something else sets its own."""

    def at(self: A, model: Model) -> A:
        """The activation with the slopes of this model, whose other axes are not known yet."""
        return self

    def d_ff(self, d_model: int) -> int:
        """Feed-forward width unless it is given: 4 d_model."""
        return 4 * d_model

    def apply(self, hidden: "Tensor", gate: "Tensor | None") -> "Tensor":
        """hidden, and the gate's product if `gated`: (batch, seq, d_ff) -> the same shape."""
        raise NotImplementedError

    def function(self) -> Function:
        """The pointwise function, of the gate if `gated`, with its Gaussian integrals."""
        raise NotImplementedError

    def output_scale(self) -> float:
        """What multiplies the pointwise function."""
        return 1.0

    def second_moment(self, variance: float) -> float:
        """E[act(x)^2] for inputs of that variance."""
        found = float(self.function().second_moment(variance)) * self.output_scale() ** 2
        return found * variance if self.gated else found

    def correlation(self, r: float) -> float:
        """Uncentred correlation of two tokens after it, from r before it at unit variance."""
        function = self.function()
        after = float(function.dual(1.0, r, 1.0)) / float(function.dual(1.0, 1.0, 1.0))
        return after * r if self.gated else after

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return None if self.standard is None else {"hidden_act": self.standard}


class Position(Value):
    """How positions enter."""

    adds_table: ClassVar[bool] = False
    """Whether a learned table is added to the embeddings."""
    pairs_features: ClassVar[bool] = False
    """Whether it turns pairs of a head's features, so that their number must be even."""
    biases_logits: ClassVar[bool] = False
    """Whether `bias` returns a bias."""
    standard: ClassVar[str | None] = None
    """What standard architectures know it as, for export: `rotary`, the halves of queries and keys turned by angles of
    base `rope_base`; `table`, a learned one; `causal`, the mask alone; None: they have none that computes the same. A
    subclass that computes something else sets its own."""

    def tables(self, model: Model, seq_len: int, d_head: int, **where: Any) -> "Chunks":
        """What `turn` needs, made once for all layers: a row of each for a position; `where`: dtype and device.

        A row does not depend on `seq_len`, unless `cache_obstacle` says so; with a cache, `turn` gets the rows of the
        new tokens alone, (seq, ...) or (batch, seq, ...).
        """
        return ()

    def turn(self, x: "Tensor", tables: "Chunks") -> "Tensor":
        """Heads of queries or keys or both, (batch, seq, heads, d_head), with their positions."""
        return x

    def bias(self, model: Model, seq_len: int, **where: Any) -> "Tensor | None":
        """(heads, seq, seq), added to the logits, -inf after the query."""
        return None

    def slopes(self, model: Model, **where: Any) -> "Tensor | None":
        """(heads,), where `bias` is -slope x distance: kernels make it on the fly; None: it is something else."""
        return None

    def bias_at(self, model: Model, places: "Tensor", length: int, **where: Any) -> "Tensor | None":
        """The rows of `bias` for queries at `places`, (batch, new) int64: (batch, heads, new, length)."""
        bias = self.bias(model, length, **where)
        return None if bias is None else bias[:, places].transpose(0, 1)

    def pattern(self, model: Model, seq_len: int, d_head: int) -> Pattern:
        """What positions do to attention at the start, for the theory, whose tables are kept by identity: cache it."""
        return causal_pattern(seq_len)

    def mean_weights(self, model: Model, q: float) -> tuple[float, float]:
        """Sum of squared attention weights, and of products of two queries' weights, averaged over positions.

        `q`: variance of the logits about their row mean. Without biases a query looks at every key up to its own
        position alike.
        """
        assert model.max_seq_len is not None
        return causal_means(model.max_seq_len, q)

    def modelling(self, model: Model) -> dict[str, Any] | None:
        if self.pairs_features and self.standard is not None:
            return {"rotary_base": model.attention.rope_base}
        return None if self.standard is None else {}


class Shaping(Value):
    """What shapes attention at initialisation: a fixed bias and row scale, or the identity beside the softmax."""

    replaces_skip: ClassVar[bool] = False
    """Whether the stream needs no skip."""
    active: ClassVar[bool] = False
    """Whether `bias_and_scale` is used; it differs between layers, and needs whole sequences."""
    combines: ClassVar[bool] = False
    """Whether `combine` is used."""
    centres: ClassVar[bool] = True
    """Whether `combine` takes away what attention would average if all queries were zero."""
    average_at_start: ClassVar[float] = 1.0
    """What multiplies the average that `combine` gets, at the start."""

    def logit_factor(self, model: Model) -> float:
        """What multiplies `Init.logit_scale`."""
        return 1.0

    def combine(self, own: "Tensor", averaged: "Tensor", centre: "Tensor", added: "Mapping[str, Tensor]") -> "Tensor":
        """The heads' output, of their own values, those that attention averages, and those it would average if all
        queries were zero (without `centres` the averaged ones again): (batch, heads, seq, d_head) each."""
        raise NotImplementedError

    def moments(self, kept: float, common: float, correlation: float) -> tuple[float, float]:
        """Variance and covariance of the heads' output per unit of the values' variance, from those of averaged values
        and the tokens' correlation."""
        return kept, common

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return None if self.active or self.combines else {}

    def bias_and_scale(self, model: Model, layer: int, seq_len: int) -> tuple[Array, Array]:
        """The bias on the logits, (seq_len, seq_len), and what multiplies each row's output, (seq_len,)."""
        raise NotImplementedError

    def rows(self, model: Model, layer: int, places: "NDArray[np.int64]", length: int) -> tuple[Array, Array]:
        """The rows of both for queries at `places`, (n,): the bias (n, length) and the factors (n,)."""
        bias, factors = self.bias_and_scale(model, layer, length)
        return bias[places], factors[places]

    def export_obstacle(self, model: Model) -> str | None:
        if self.combines:
            return "its attention adds the identity to its weights, which no standard architecture does"
        return "its attention has a fixed bias, which no standard architecture has" if self.active else None

    def import_obstacle(self, model: Model) -> str | None:
        if self.combines:
            return "it adds the identity to the attention weights, which a plain model does not"
        return "it adds a fixed bias to attention, which a plain model does not have" if self.active else None


class AttentionGate(Value):
    """What multiplies the heads' output, made of what the sub-layer reads."""

    def width(self, model: Model) -> int:
        """Rows of the gate's map; 0: there is none."""
        return 0

    def apply(self, mixed: "Tensor", logits: "Tensor", added: "Mapping[str, Tensor]") -> "Tensor":
        """mixed: (batch, seq, heads, d_head), logits: (batch, seq, width) -> as mixed."""
        raise NotImplementedError

    def moments(self, kept: float, common: float, model: Model, variance: float, r: float) -> tuple[float, float]:
        """Variance and covariance of two tokens after it, from those before it and the variance and correlation of what
        the sub-layer reads."""
        return kept, common

    def logit_mean(self, model: Model) -> float:
        """Mean of its logits at the start."""
        return 0.0

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return None if self.width(model) else {}

    def export_obstacle(self, model: Model) -> str | None:
        return "its heads have gates, which none of the formats has" if self.width(model) else None

    def import_obstacle(self, model: Model) -> str | None:
        return "its heads have gates, which a plain model does not have" if self.width(model) else None


class Softmax(Value):
    """How logits become attention weights."""

    null_at_start: ClassVar[float | None] = None
    """The logit at the start of a further term of the denominator, as of a key without a value; None: there is none."""

    def null_logits(self, heads: int, added: "Mapping[str, Tensor]", like: "Tensor") -> "Tensor | None":
        """That logit of each head, (heads,), in at least the precision of `like`, on its device."""
        return None

    def clip(self, model: Model) -> tuple[float, float] | None:
        """(zeta, gamma): weights become clip((zeta - gamma) w + gamma, 0, 1); None: they stay."""
        return None

    def is_plain(self, model: Model) -> bool:
        """Whether it is the softmax of every standard kernel."""
        return self.null_at_start is None and self.clip(model) is None

    def weights(self, model: Model, logits: "Tensor", null: "Tensor | None") -> "Tensor":
        """logits: (batch, heads, queries, keys), null: (heads,) -> the weights of the keys, in the dtype of logits."""
        import torch

        weights = logits.softmax(dim=-1)
        if null is not None:
            sums = logits.logsumexp(dim=-1, keepdim=True)
            weights = weights * torch.sigmoid(sums - null.to(logits.dtype)[:, None, None])
        limits = self.clip(model)
        if limits is None:
            return weights
        zeta, gamma = limits  # gamma is not above 0, so that what a query may not see keeps a weight of 0
        return ((zeta - gamma) * weights + gamma).clamp(0, 1)

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return {} if self.is_plain(model) else None

    def export_obstacle(self, model: Model) -> str | None:
        return None if self.is_plain(model) else "its attention weights are no plain softmax"

    def import_obstacle(self, model: Model) -> str | None:
        return None if self.is_plain(model) else "its attention weights are no plain softmax, which the source's are"


class ValueMixing(Value):
    """Whether later layers see the first layer's values."""

    share: ClassVar[float | None] = None
    """The first layer's share in the values of the others at the start, 1 - share is their own; None: none is kept."""

    def modelling(self, model: Model) -> dict[str, Any] | None:
        return {} if self.share is None else None

    def mix(self, own: "Tensor", first: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        """The values of a later layer, from its own and the first's; (batch, seq, d_kv) each; `added`: by name, what
        axis values add to its attention (`in_attention`)."""
        return own

    def export_obstacle(self, model: Model) -> str | None:
        if self.share is None:
            return None
        return "the values of its layers are mixed with the first layer's, which no standard architecture does"

    def import_obstacle(self, model: Model) -> str | None:
        return "its layers mix their values with the first layer's" if self.share is not None else None


class Maps(Value):
    """How the maps of attention are made."""

    has_values: ClassVar[bool] = True
    """Whether there are a value and an output map; without, heads average their slices of what the sub-layer reads."""

    def rank(self, model: Model) -> int | None:
        """Inner width of factorised query, key and value maps; None: they are whole."""
        return None

    def import_obstacle(self, model: Model) -> str | None:
        return "its query, key and value maps have a lower rank than whole matrices" if self.rank(model) else None


class Stack(Value):
    """Which layers there are, and which of them runs at each of the `n_layers` places of the stack."""

    shared: ClassVar[bool] = False
    """Whether a layer runs at several places."""

    def distinct(self, model: Model) -> int:
        """The number of layers with parameters of their own."""
        return model.n_layers

    def layer_at(self, model: Model, place: int) -> int:
        """The layer, counted from 0, that runs at a place."""
        return place

    def places(self, model: Model) -> list[int]:
        """The layer that runs at each place."""
        return [self.layer_at(model, place) for place in range(model.n_layers)]

    def first_place(self, model: Model, layer: int) -> int:
        """Where a layer runs first, by which its initial values are chosen."""
        return self.places(model).index(layer) if self.shared else layer

    def unshared(self, model: M) -> M:
        """The model of the same function whose layers all have parameters of their own."""
        return model


class DepthDrop(Value):
    """Which branches are left out of a training step at random; each with the chance of its sub-layer."""

    active: ClassVar[bool] = False
    """Whether any is left out."""

    def draws_layers(self, model: Model) -> bool:
        """Whether both branches of a layer are left out together."""
        return True

    def survival(self, model: Model, sublayer: int) -> float:
        """The probability that a branch is kept."""
        return 1.0

    def trained(self, model: Model, sublayer: int) -> float:
        """What multiplies a branch that is kept, in training."""
        return 1.0

    def evaluated(self, model: Model, sublayer: int) -> float:
        """What multiplies every branch in evaluation."""
        return 1.0

    def root_mean_square(self, model: Model, sublayer: int) -> float:
        """Of what multiplies the branch in training: for the theory, and for passes of no training step."""
        return math.sqrt(self.survival(model, sublayer)) * self.trained(model, sublayer)


class Gains(Value):
    """Learned factors inside the bodies and at the logits, and where queries and keys are normalised by them."""

    after_turn: ClassVar[bool] = False
    """Whether `queries_and_keys` changes anything."""

    def at(self, model: Model) -> "Gains":
        """The value with the constants of this model."""
        return self

    def in_body(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        """Parameters that each body gets."""
        return ()

    def queries_and_keys(
        self, query: "Tensor", key: "Tensor", added: Mapping[str, "Tensor"]
    ) -> "tuple[Tensor, Tensor]":
        """(batch, seq, heads, d_head) each, with their positions."""
        return query, key

    def hidden(
        self, hidden: "Tensor", gate: "Tensor | None", added: Mapping[str, "Tensor"]
    ) -> "tuple[Tensor, Tensor | None]":
        """What the activation reads, (batch, seq, d_ff) each."""
        return hidden, gate

    def in_head(self, model: Model) -> tuple[Added, ...]:
        """Parameters that an untied head gets."""
        return ()

    def output_matrix(self, weight: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        """What an untied head multiplies by, from its matrix (vocab_size, d_model)."""
        return weight

    def logit_factor(self, model: Model) -> float:
        """What multiplies the scale of query . key beside `Init.logit_scale`."""
        return 1.0

    def start(self, model: Model, kind: str) -> float:
        """What multiplies the products of a kind of matrix, or of the head, at the start, for the theory."""
        return 1.0

    def logits_at_start(self, model: Model) -> float:
        """What multiplies the logits of queries and keys of length sqrt(d_head) at the start beside
        `Init.logit_scale`, if `normalises_keys`."""
        return 1.0

    def normalises_keys(self, model: Model) -> bool:
        """Whether queries and keys are normalised, whatever by."""
        return bool(model.attention.qk_norm)


class MethodOptions:
    """Base of a method's options, a frozen dataclass of `stablelm.key.key` fields: the section `model.<SECTION>`.

    Those of a method named by import path are read from `model.method_options`.
    """

    SECTION: ClassVar[str] = ""
    SHORT_FORM: ClassVar[bool] = False
    """Whether `<SECTION>.*` means `model.<SECTION>.*`."""


@dataclass(frozen=True)
class Axes:
    """The values of a model."""

    stream: Stream
    placement: Placement
    norm: NormKind
    init: Init
    reparam: Reparam
    activation: Activation
    position: Position
    shaping: Shaping
    gate: AttentionGate
    softmax: Softmax
    value_mixing: ValueMixing
    maps: Maps
    stack: Stack
    depth_drop: DepthDrop
    gains: Gains

    def each(self) -> tuple[Value, ...]:
        """All of them."""
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Method:
    """A named point of the space, and what its file introduces.

    `defaults`: keys of the model section, written as under `model.`, to the method's own values; what it leaves out is
    as in `pre_ln`. `values`: the axis values that it introduces, `options`: its options.
    """

    name: str
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[Value, ...] = ()
    options: tuple[type[MethodOptions], ...] = ()
