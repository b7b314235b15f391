"""The keys of the section `model`, in the form of `config.schema`."""

# ruff: noqa: RUF009 - key() makes dataclass fields

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from stablelm.key import key
from stablelm.methods import catalogue
from stablelm.methods.axes import AttentionKeys, Axes, Model, Options


@dataclass(frozen=True)
class AttentionConfig(AttentionKeys):
    position: str | None = key(
        None, "how positions enter; None: the method's own", identity=True, path=False, axis="position"
    )
    rope_base: float = key(10000.0, "base of the rotary frequencies", identity=True)
    qk_norm: bool | None = key(None, "RMSNorm over each head's queries and keys; None: the method's own", identity=True)
    logit_cap: float | None = key(
        None, "logits become cap * tanh(logit / cap); 0: no cap; None: the method's own", identity=True
    )
    value_residual: bool | None = key(
        None, "values are the mean of the layer's own and the first layer's; None: the method's own", identity=True
    )
    low_rank: float | None = key(
        None,
        "rank of query, key and value maps as a share of d_model (two factors each); 0: full maps; "
        "None: the method's own",
        identity=True,
    )
    value_maps: bool | None = key(
        None,
        "whether attention has value and output maps; without, each head averages its slice of what the sub-layer "
        "reads; None: the method's own",
        identity=True,
    )
    document_end: int | None = key(
        None,
        "token that ends a document, which attention does not cross; set by data.document_mask; None: it crosses",
        identity=True,
    )
    shaping: str | None = key(
        None,
        "espa, uspa: attention starts as a fixed matrix that needs no skip, by a decay or alike for all tokens; "
        "value_skip: as the identity, with learned gains; shaped, simplified: the identity is added to its weights and "
        "what they are without queries subtracted; None: the method's own",
        identity=True,
        path=False,
        axis="shaping",
    )
    gate: str | None = key(
        None,
        "a sigmoid gate, of what the sub-layer reads, on each head's output or each of its features; None: the "
        "method's own",
        identity=True,
        path=False,
        axis="gate",
    )
    softmax: str | None = key(
        None,
        "how logits become weights: off_by_one adds 1 to the denominator, sink a learned term for each head, clipped "
        "stretches weights and clips them to 0 and 1; None: the method's own",
        identity=True,
        path=False,
        axis="softmax",
    )

    def changed(self, **changes: Any) -> "AttentionConfig":
        """A copy with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class ModelConfig(Model):
    method: str = key(
        "pre_ln", "named point of the method space; keys beside it override it", identity=True, path=False
    )
    n_layers: int = key(12, "layers, each an attention and a feed-forward sub-layer", identity=True)
    d_model: int = key(384, "width of the residual stream", identity=True)
    n_heads: int = key(6, "query heads; must divide d_model", identity=True)
    kv_heads: int | None = key(None, "key/value heads; must divide n_heads; None: n_heads", identity=True)
    d_ff: int | None = key(
        None, "feed-forward width; None: 4 d_model, for swiglu 8/3 d_model to a multiple of 64", identity=True
    )
    max_seq_len: int | None = key(
        None, "longest sequence the positions allow; None: data.seq_len", unit="tokens", identity=True
    )
    vocab_size: int | None = key(
        None, "rows of the embedding; None: the tokenizer's pieces, padded to a multiple of 64", identity=True
    )
    dropout: float = key(0.0, "probability after embeddings, sub-layers and on attention weights", identity=True)
    tie_embeddings: bool | None = key(None, "head shares the embedding; None: the method's own", identity=True)
    stream_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "residual stream under precision bf16; fp32 keeps small additions at great depth", identity=True
    )
    stream: str | None = key(None, "how a branch joins the stream", identity=True, path=False, axis="stream")
    placement: str | None = key(None, "where norms sit", identity=True, path=False, axis="placement")
    norm: str | None = key(None, "kind of norm", identity=True, path=False, axis="norm")
    norm_eps: float = key(1e-5, "added to the variance in norms", identity=True)
    norm_alpha: float = key(0.5, "start of the slope inside dyt's tanh", identity=True)
    embedding_norm: bool | None = key(
        None, "a norm on the embeddings, after their dropout; None: the method's own", identity=True
    )
    embedding_gradient_scale: float = key(
        1.0, "what multiplies the gradient of looked-up token embeddings; GLM-130B: 0.1", identity=True
    )
    init: str | None = key(None, "initialisation of the weights", identity=True, path=False, axis="init")
    reparam: str | None = key(None, "reparametrisation of the weights", identity=True, path=False, axis="reparam")
    activation: str | None = key(
        None,
        "feed-forward activation; tailored: a leaky relu whose slope fits the depth",
        identity=True,
        path=False,
        axis="activation",
    )
    stack: str | None = key(
        None,
        "which layers run at the n_layers places: plain: each its own; cycle, sequence: model.shared.repeats places "
        "share one; None: the method's own",
        identity=True,
        path=False,
        axis="stack",
    )
    depth_drop: str | None = key(
        None,
        "branches left out of a training step at random, with model.drop.rate: uniform over depth, or linear_decay of "
        "their survival; None: the method's own",
        identity=True,
        path=False,
        axis="depth_drop",
    )
    gains: str | None = key(
        None,
        "learned factors inside the sub-layers and at the logits; None: the method's own",
        identity=True,
        path=False,
        axis="gains",
    )
    bias: bool | None = key(None, "biases in linear maps and layernorms; None: the method's own", identity=True)
    method_options: dict[str, str | int | float | bool] = key(
        dict, "options of a method that is named by import path", identity=True, path=False
    )
    attention: AttentionConfig = key(AttentionConfig, "attention options", identity=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    options: tuple[Any, ...] = field(default=(), metadata={"sections": True})
    """Options of methods that differ from their defaults; each is a section `model.<SECTION>`."""

    @cached_property
    def axes(self) -> Axes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values of the axes, all of which must be filled (`apply_method`)."""
        return catalogue.axes(self)

    def option(self, kind: type[Options]) -> Options:
        """The options of a method, its own section of the configuration."""
        if kind not in catalogue.options().values():
            return kind(**self.method_options)
        return next((options for options in self.options if type(options) is kind), None) or kind()

    def changed(self, *options: Any, **changes: Any) -> "ModelConfig":
        """A copy with other values; each of `options` replaces the section of its type."""
        others = tuple(kept for kept in self.options if type(kept) not in map(type, options))
        return replace(self, options=others + options, **changes)
