"""A decoder-only language model with the streams, norms and attention that stablelm trains, for transformers >= 5.2.

Needs torch and transformers alone; the folder that holds it is loaded by
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. The configuration names mechanisms and numbers;
with its defaults the model is a plain pre-norm transformer. The stream and the statistics of norms are kept in at least
fp32, whatever the dtype of the weights.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

IDENTITY_GAINS = ("own_gain", "average_gain", "centre_gain")
# Versions before the rename call the cache past_key_values, in arguments and outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

Tensors = tuple[Tensor, ...]
Inputs = Tensor | Tensors

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "max_position_embeddings": 512,
    "low_rank": None,
    "bias": False,
    "dropout": 0.0,
    "rotary_base": None,
    "position_table": False,
    "alibi_slopes": None,
    "logit_scale": None,
    "logit_cap": None,
    "qk_norm": False,
    "first_value_share": None,
    "document_end": None,
    "attention_innovations": None,
    "attention_factors": None,
    "attention_correlations": None,
    "value_maps": True,
    "gate_rows": 0,
    "gate_bias": False,
    "null_key": False,
    "learned_null": False,
    "weight_limits": None,
    "identity_heads": False,
    "learned_identity": False,
    "value_gains": False,
    "norm_embedding": False,
    "norm_before_body": True,
    "norm_before_output": False,
    "norm_on_branch": False,
    "norm_after_write": False,
    "norm_final": True,
    "norm_centred": False,
    "norm_slope": None,
    "norm_unit": False,
    "norm_compressed": False,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "norm_eps_scales": None,
    "skip_gain": 1.0,
    "branch_gain": 1.0,
    "branch_factors": None,
    "step_ratio": None,
    "unit_ratios": None,
    "learned_gain": False,
    "learned_skip": None,
    "dual_stream": False,
    "head_scales": False,
    "attention_skip": True,
    "parallel": False,
    "growth": None,
    "mixes_outputs": False,
    "mixes_separately": False,
    "mix_hidden_multiple": None,
    "copies": None,
    "copies_dynamic": False,
    "copies_iterations": None,
    "copies_exchange": 0.01,
    "depth_block": None,
    "gru_bias": None,
    "embedding_scale": 1.0,
    "head_scale": 1.0,
    "hidden_act": "gelu",
    "gated": False,
    "negative_slope": None,
    "activation_scale": 1.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Settings of the model and their defaults; `StablelmDecoderConfig` says what they mean."""


class StablelmDecoderConfig(PreTrainedConfig):
    """Settings of the model; x is the stream, f a sub-layer's body (attention or feed-forward).

    Sizes: `head_dim` None: hidden_size / heads; `num_key_value_heads` None: as many as heads; `low_rank`: inner width
    of factorised query, key and value maps. Positions: `rotary_base`, `position_table` (learned, added to the
    embeddings) and `alibi_slopes` (one a head), each off by default. Attention: `logit_scale` None: head_dim^-0.5;
    `logit_cap`: logits become cap tanh(logit / cap); `qk_norm`: RMSNorm over each head's queries and keys;
    `first_value_share`: share of the first layer's values in those of the later layers; `document_end`: token whose
    documents attention does not cross; `attention_innovations`: see `decay_of`, from before the first layer to after
    the last, with `attention_factors` of each layer; `attention_correlations`: see `uniform_of`, a pair for each layer;
    `value_gains`: heads' own values and averages have a learned gain each; `value_maps` off: heads average their slices
    of what is read, without an output map; `gate_rows`: sigmoids of what is read multiply the heads' output, one for
    each head or each feature, `gate_bias` with a bias; `head_scales`: a learned factor of what each head averages;
    `null_key`: one more term in the denominator of the softmax, e^0 or, with `learned_null`, of a logit for each head;
    `weight_limits` (zeta, gamma): weights w become clip((zeta - gamma) w + gamma, 0, 1); `identity_heads`: the identity
    is added to the weights and what they are without queries subtracted, each with a gain for each head with
    `learned_identity`. Norms: `norm_*` say where, of all sub-layers or as a list of each; `norm_centred`: the mean is
    subtracted; `norm_slope`: tanh(slope x) in place of a norm, with a learned slope that starts there; `norm_unit`: x /
    |x| in its place; `norm_compressed`: the root mean square is that of x and of one more feature, minus the sum of all
    (Jiang et al., 2023); `norm_eps_scales`: factors of `norm_eps` in front of each sub-layer, and last at the end.
    Stream: x <- skip_gain x + branch_gain f(x), both of all sub-layers or as lists; the branch times a learned gain of
    `learned_gain` numbers, 1 or hidden_size; the skip of the kinds of sub-layers in `learned_skip` times a learned
    factor for each feature, and the branch times `branch_factors`, one for each sub-layer; `step_ratio`: x <- x + a
    (f(x) - x) with a = |alpha| step_ratio and a learned alpha for each feature; `unit_ratios`: queries and keys have
    length 1 and learned factors, as the inputs of the activation have (nGPT, Loshchilov et al., 2024); `attention_skip`
    off: attention's output is the stream, and learned gains are the feed-forwards' alone; `parallel`: these read what
    attention reads; `dual_stream`: beside x a sum of all branches without norms, which the final norm reads and to
    which x is added; `growth`: the output of that width is appended to x instead; `mixes_outputs`: after each layer x
    is a learned sum of the embeddings and all layers' outputs; `mixes_separately`: and so are, with sums and norms of
    their own, the inputs of the next layer's query, key and value, with `mix_hidden_multiple` by weights of each token.
    `copies`: x is that many tensors which learned weights mix, with `copies_dynamic` of each token, with
    `copies_iterations` those of Sinkhorn and Knopp, at the start a share `copies_exchange` of the others.
    `depth_block`: a softmax average of the embedding and of sums of so many sub-layers' outputs is read. `gru_bias`: a
    recurrent unit's gate in place of the sum, and the start of its bias. `embedding_scale` and `head_scale` multiply
    the embeddings and what the head reads. Feed-forward: `hidden_act` by transformers' name, of the gate if `gated`;
    `negative_slope`: a leaky relu in its place; times `activation_scale`.
    """

    model_type = "stablelm_decoder"
    keys_to_ignore_at_inference = (CACHE,)

    def __init__(self, **settings: Any):
        own = {name: settings.pop(name, default) for name, default in DEFAULTS.items()}
        for name, value in own.items():
            setattr(self, name, value)
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.logit_scale = self.head_dim**-0.5 if self.logit_scale is None else self.logit_scale
        # The base class sets these anew, some of them by defaults of its own.
        shared = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        super().__init__(**{name: own[name] for name in shared}, **settings)


class Shared(NamedTuple):
    """What all layers need to know of the tokens of a call; q queries are the last of k keys."""

    dtype: torch.dtype
    """Of the inputs of matrix products."""
    rotation: tuple[Tensor, Tensor] | None
    """(cos, sin), each (batch or 1, 1, q, head_dim / 2)."""
    allowed: Tensor | None
    """(batch or 1, 1, q, k) bool: the keys that a query sees; None: all up to it, of which there are q, or all for
    q = 1."""
    bias: Tensor | None
    """(batch or 1, heads, q, k), added to the logits where `allowed`, -inf elsewhere."""
    places: tuple[Tensor, Tensor] | None
    """Places of queries and of keys among the tokens of their row that are no padding, (batch or 1, q) and (.., k)."""
    ends: Tensor | None
    """(batch, q) bool: the queries after which a document begins."""
    rows: dict[str, Tensor]
    """Where a cache of fixed size puts the keys of the queries, as earlier versions of the library ask for."""


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_sublayer(setting: Any, index: int) -> Any:
    """The setting of a sub-layer: its entry of a list, or the one of all."""
    return setting[index] if isinstance(setting, (list, tuple)) else setting


class Norm(nn.Module):
    """Over the last dimension; returns at least fp32."""

    def __init__(self, config: StablelmDecoderConfig, width: int, *, of_heads: bool = False, reads: int | None = None):
        super().__init__()
        scales = config.norm_eps_scales
        self.eps = config.norm_eps * (1.0 if scales is None or reads is None else scales[reads])
        self.slope = None if of_heads else config.norm_slope
        self.centred = config.norm_centred and not of_heads
        self.compressed = config.norm_compressed and not of_heads
        self.weight = None if config.norm_unit and not of_heads else nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias and not of_heads else None
        self.alpha = nn.Parameter(torch.full((1,), self.slope)) if self.slope is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        if self.weight is None:
            return F.normalize(x, dim=-1, eps=1e-30)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.alpha is not None:
            x = torch.tanh(self.alpha.to(x.dtype) * x) * weight
            return x if bias is None else x + bias
        if self.centred:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        if self.compressed:
            squares = x.square().sum(dim=-1, keepdim=True) + x.sum(dim=-1, keepdim=True).square()
            x = x * torch.rsqrt(squares / (x.shape[-1] + 1) + self.eps) * weight
        else:
            x = F.rms_norm(x, weight.shape, weight, self.eps)
        return x if bias is None else x + bias


class LowRank(nn.Module):
    """A map of two factors."""

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def uniform_of(
    correlations: tuple[float, float], places: tuple[Tensor, Tensor], allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `decay_of`, the matrix that takes the kernel (1 - r) I + r 11^T of one correlation to that of another.

    He et al., ICLR 2023: the quotient of their Cholesky factors, whose columns below the diagonal differ by a vector.
    """
    query, key = places[0][:, None, :, None], places[1][:, None, None, :]
    where = {"dtype": torch.float32 if query.device.type == "mps" else torch.float64, "device": query.device}
    k = torch.arange(key.shape[-1], **where)
    before, after = (
        ((1 - r) * (1 + k * r) / (1 + (k - 1) * r), r / (1 + (k - 1) * r), r / (1 + k * r)) for r in correlations
    )
    g = (after[0] / before[0]).sqrt()
    g[0], weights = 1.0, before[1]
    weights[0], h = 0.0, after[2] * g
    sums = (h * weights).cumsum(dim=0)
    rows = (h + sums)[key] - (sums - h * weights + g * weights)[query]
    rows = torch.where(query == key, g[query], rows)
    rows = rows.masked_fill(query < key if allowed is None else ~allowed, 0.0)
    sums = rows.sum(dim=-1, keepdim=True)
    return (rows / sums).log(), sums


def decay_of(
    innovations: tuple[float, float], factors: list[float], places: tuple[Tensor, Tensor], allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(bias on the logits, factor of each row's output) that make attention a fixed decay when the logits are 0.

    He et al., Deep Transformers without Shortcuts, ICLR 2023: weights as of the matrix L_l L_{l-1}^-1 of the Cholesky
    factors of exp(-gamma |i - j|) after and before the layer, gamma given by the innovation a = sqrt(1 - exp(-2 gamma))
    of an AR(1) process; `factors`: of the first positions, later ones have the last. (batch or 1, 1, q, k) and
    (.., q, 1).
    """
    before, after = innovations
    phi, phi_before = math.sqrt(1 - after**2), math.sqrt(max(0.0, 1 - before**2))
    log_phi, log_ratio = math.log(phi), math.log(after / before)
    query, key = places[0][:, None, :, None], places[1][:, None, None, :]
    distance = (query - key).to(torch.float32 if query.device.type == "mps" else torch.float64)
    logs = log_ratio + math.log(phi - phi_before) + (distance - 1) * log_phi
    first = (distance - 1) * log_phi + math.log(phi - after / before * phi_before)
    logs = torch.where(key == 0, first, logs)
    logs = torch.where(distance == 0, torch.where(key == 0, 0.0, log_ratio), logs)
    logs = logs.masked_fill(distance < 0 if allowed is None else ~allowed, -math.inf)
    planned = torch.tensor(factors, dtype=logs.dtype, device=logs.device)
    return logs.log_softmax(dim=-1), planned[query[..., 0].clamp(max=len(factors) - 1)][..., None]


class Attention(nn.Module):
    """Causal self-attention; query head i reads key/value head i // (heads / key/value heads)."""

    def __init__(self, config: StablelmDecoderConfig, d_in: int, d_out: int, layer: int):
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        width, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        rank, bias = config.low_rank, config.bias

        def first(d_out: int) -> nn.Module:
            return nn.Linear(d_in, d_out, bias=bias) if rank is None else LowRank(d_in, rank, d_out, bias)

        self.query, self.key = first(width), first(d_kv)
        self.value = first(d_kv) if config.value_maps else None
        self.head_gate = nn.Linear(d_in, config.gate_rows, bias=False) if config.gate_rows else None
        heads = config.num_attention_heads
        self.gate_bias = nn.Parameter(torch.zeros(config.gate_rows)) if config.gate_bias else None
        self.sink = nn.Parameter(torch.zeros(heads)) if config.learned_null else None
        for name in IDENTITY_GAINS if config.learned_identity else ():
            self.register_parameter(name, nn.Parameter(torch.ones(heads)))
        for name in IDENTITY_GAINS[:2] if config.value_gains else ():
            self.register_parameter(name, nn.Parameter(torch.ones(1)))
        self.norm_query = Norm(config, self.head_dim, of_heads=True) if config.qk_norm else None
        self.norm_key = Norm(config, self.head_dim, of_heads=True) if config.qk_norm else None
        self.norm_inner = Norm(config, width) if of_sublayer(config.norm_before_output, 2 * layer) else None
        self.head_scale = nn.Parameter(torch.ones(config.num_attention_heads)) if config.head_scales else None
        self.output = nn.Linear(width, d_out, bias=bias) if config.value_maps else None
        self.ratio = None if config.unit_ratios is None else config.unit_ratios["query_key"]
        self.scale_qk = None if self.ratio is None else nn.Parameter(torch.full((width,), 1 / self.ratio))

    def forward(
        self, x: Inputs, shared: Shared, first_value: Tensor | None, cache: Cache | None, weights_too: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (batch, q, d_in), or one for each of the first maps -> its branch, its values (batch, q, d_kv), and the
        attention weights if asked for."""
        read = x if isinstance(x, tuple) else (x, x, x)
        query, key = self.query(read[0]), self.key(read[1])
        own_value = read[2] if self.value is None else self.value(read[2])
        share, value = self.config.first_value_share, own_value
        if share is not None and first_value is not None:
            value = (1 - share) * own_value + share * first_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        if self.norm_query is not None and self.norm_key is not None:
            query, key = self.norm_query(query).to(query.dtype), self.norm_key(key).to(key.dtype)
        if shared.rotation is not None:
            query, key = rotate(query, *shared.rotation), rotate(key, *shared.rotation)
        if self.scale_qk is not None and self.ratio is not None:
            factor = (self.scale_qk * self.ratio).square().view(-1, 1, self.head_dim)
            query, key = (F.normalize(at_least_fp32(part), dim=-1, eps=1e-30).to(part.dtype) for part in (query, key))
            query = query * factor.to(query.dtype)
        own = value
        if cache is not None:
            key, value = self._cached(key, value, shared, cache)
        bias, rows = shared.bias, None
        if self.config.attention_innovations is not None and shared.places is not None:
            before, after = self.config.attention_innovations[self.layer : self.layer + 2]
            factors = self.config.attention_factors[self.layer]
            bias, rows = decay_of((before, after), factors, shared.places, shared.allowed)
        if self.config.attention_correlations is not None and shared.places is not None:
            bias, rows = uniform_of(self.config.attention_correlations[self.layer], shared.places, shared.allowed)
        mixed, weights = self._average(query, key, value, shared.allowed, bias, weights_too)
        if rows is not None:
            mixed = mixed * rows.to(mixed.dtype)
        if self.config.value_gains:
            own = own.repeat_interleave(len(query[0]) // len(own[0]), dim=1)
            of_own, of_average = (getattr(self, name).to(own.dtype) for name in IDENTITY_GAINS[:2])
            mixed = of_own * own + of_average * mixed
        if self.config.identity_heads:
            centre, _ = self._average(torch.zeros_like(query), key, value, shared.allowed, bias, False)
            mixed = self._with_identity(own.repeat_interleave(len(query[0]) // len(own[0]), dim=1), mixed, centre)
        mixed = mixed.transpose(1, 2)
        if self.head_gate is not None:
            logits = at_least_fp32(self.head_gate(read[0]))
            logits = logits if self.gate_bias is None else logits + self.gate_bias.to(logits.dtype)
            mixed = mixed * logits.sigmoid().to(mixed.dtype).unflatten(-1, (mixed.shape[-2], -1))
        if self.head_scale is not None:
            mixed = mixed * self.head_scale.to(mixed.dtype)[:, None]
        mixed = mixed.flatten(-2)
        if self.norm_inner is not None:
            mixed = self.norm_inner(mixed).to(mixed.dtype)
        return mixed if self.output is None else self.output(mixed), own_value, weights

    def _with_identity(self, own: Tensor, averaged: Tensor, centre: Tensor) -> Tensor:
        """(batch, heads, q, head_dim) each: the heads' own values, and what is added to them."""
        if not self.config.learned_identity:
            return own + (averaged - centre)
        gains = (getattr(self, name).to(own.dtype)[:, None, None] for name in IDENTITY_GAINS)
        of_own, of_average, of_centre = gains
        return of_own * own + (of_average * averaged - of_centre * centre)

    def _weights(self, logits: Tensor) -> Tensor:
        """(batch, heads, q, k): the softmax of logits, of which a further term takes a share, clipped."""
        weights = logits.softmax(dim=-1)
        if self.config.null_key:
            sums = logits.logsumexp(dim=-1, keepdim=True)
            null = 0.0 if self.sink is None else self.sink.to(logits.dtype)[:, None, None]
            weights = weights * torch.sigmoid(sums - null)
        if self.config.weight_limits is None:
            return weights
        zeta, gamma = self.config.weight_limits
        return ((zeta - gamma) * weights + gamma).clamp(0, 1)

    def _cached(self, key: Tensor, value: Tensor, shared: Shared, cache: Cache) -> tuple[Tensor, Tensor]:
        """With those of earlier calls. The first layer's keys carry one more feature: whether a document ends."""
        if shared.ends is None or self.layer:
            return cache.update(key, value, self.layer, shared.rows)
        ends = shared.ends[:, None, :, None].expand(*key.shape[:-1], 1).to(key.dtype)
        key, value = cache.update(torch.cat((key, ends), dim=-1), value, self.layer, shared.rows)
        return key[..., :-1], value

    def _average(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        bias: Tensor | None,
        weights_too: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, heads, q, head_dim): values averaged by softmax attention."""
        config = self.config
        dropout = config.dropout if self.training else 0.0
        cap, causal, groups = config.logit_cap, query.shape[-2] > 1, query.shape[1] // key.shape[1]
        plain = not (cap or config.null_key or config.weight_limits is not None)
        if plain and not weights_too and config._attn_implementation != "eager":
            mask = allowed if bias is None else bias.to(query.dtype)
            options = {"dropout_p": dropout, "is_causal": mask is None and causal, "scale": config.logit_scale}
            if mask is not None and query.is_cuda:
                # With both a mask and groups no kernel there avoids to hold all logits.
                key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, mask, **options, enable_gqa=grouped), None
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        logits = at_least_fp32(query @ key.transpose(-1, -2)) * config.logit_scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        elif allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        elif causal:
            after = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(after, -math.inf)
        weights = F.dropout(self._weights(logits).to(value.dtype), dropout)
        return weights @ value, weights


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns feature i of each head against feature i + head_dim / 2; x: (batch, heads, q, head_dim)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """fc2(act(fc1 x)), or with a gate fc2(act(gate x) * fc1 x)."""

    def __init__(self, config: StablelmDecoderConfig, d_in: int, d_out: int, index: int):
        super().__init__()
        width = config.intermediate_size
        self.fc1 = nn.Linear(d_in, width, bias=config.bias)
        self.gate = nn.Linear(d_in, width, bias=config.bias) if config.gated else None
        slope = config.negative_slope
        self.act = ACT2FN[config.hidden_act] if slope is None else nn.LeakyReLU(slope)
        self.scale = config.activation_scale
        self.norm_inner = Norm(config, width) if of_sublayer(config.norm_before_output, index) else None
        self.fc2 = nn.Linear(width, d_out, bias=config.bias)
        self.ratios = config.unit_ratios
        self.scale_u = None if self.ratios is None else nn.Parameter(torch.ones(width))
        self.scale_v = None if self.ratios is None or self.gate is None else nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.fc1(x), None if self.gate is None else self.gate(x)
        if self.ratios is not None and self.scale_u is not None:
            hidden = hidden * (self.scale_u * self.ratios["up"]).to(hidden.dtype)
            if gate is not None and self.scale_v is not None:
                gate = gate * (self.scale_v * self.ratios["gate"]).to(gate.dtype)
        hidden = self.act(hidden) if gate is None else self.act(gate) * hidden
        if self.scale != 1:
            hidden = hidden * self.scale
        if self.norm_inner is not None:
            hidden = self.norm_inner(hidden).to(x.dtype)
        return self.fc2(hidden)


class Sublayer(nn.Module):
    """A body with its norms and its way onto the stream; `index` counts both kinds."""

    def __init__(self, config: StablelmDecoderConfig, index: int):
        super().__init__()
        self.config, self.index, self.grows = config, index, config.growth is not None
        self.skip_gain, self.branch_gain = (of_sublayer(gain, index) for gain in (config.skip_gain, config.branch_gain))
        growth, before = config.growth or 0, of_sublayer(config.norm_before_body, index)
        d_in, d_out = config.hidden_size + index * growth, growth or config.hidden_size
        self.norm_in = Norm(config, d_in, reads=index) if before else None
        self.body = FeedForward(config, d_in, d_out, index) if index % 2 else Attention(config, d_in, d_out, index // 2)
        self.separate = config.mixes_separately and index % 2 == 0 and index > 0
        for name in ("norm_in_1", "norm_in_2") if self.separate else ():
            self.register_module(name, Norm(config, d_in, reads=index) if before else None)
        self.norm_branch = Norm(config, d_out) if of_sublayer(config.norm_on_branch, index) else None
        self.dropout = nn.Dropout(config.dropout)
        if not config.attention_skip and index % 2 == 0:
            self.skip_gain = 0.0
        self.factor = 1.0 if config.branch_factors is None else config.branch_factors[index]
        has_gain = config.learned_gain and (config.attention_skip or index % 2 == 1)
        self.gain = nn.Parameter(torch.zeros(int(config.learned_gain))) if has_gain else None
        self.ratio = config.step_ratio
        self.alpha = None if self.ratio is None else nn.Parameter(torch.full((d_out,), 0.05 / self.ratio))
        kind = "feedforward" if index % 2 else "attention"
        self.skip = nn.Parameter(torch.ones(d_out)) if kind in (config.learned_skip or ()) else None
        for name, start in stream_starts(config, index).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(start.shape)))
        self.norm_out = Norm(config, d_out) if of_sublayer(config.norm_after_write, index) else None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what is registered by name

    def read(self, x: Tensor, outputs: Tensors, dtype: torch.dtype) -> Inputs:
        if self.separate:
            norms = (self.norm_in, self.norm_in_1, self.norm_in_2)
            read = zip(norms, outputs[:3], strict=True)
            return tuple((each if norm is None else norm(each)).to(dtype) for norm, each in read)
        if self.config.copies is not None:
            x = torch.einsum("...n,...nd->...d", self._copy_weights(x, "read"), x)
        return (x if self.norm_in is None else self.norm_in(x)).to(dtype)

    def write(self, x: Tensor, outputs: Tensors, branch: Tensor) -> tuple[Tensor, Tensors]:
        """The stream after the branch has joined it, in the stream's dtype, and the outputs that are kept beside it."""
        if self.norm_branch is not None:
            branch = self.norm_branch(branch)
        branch = self.dropout(branch)
        if self.gain is not None:
            branch = branch * self.gain.to(branch.dtype)
        branch = branch.to(x.dtype) if self.factor == 1 else branch.to(x.dtype) * self.factor
        if self.grows:
            return torch.cat((x, branch), dim=-1), outputs
        if self.config.depth_block is not None:
            return self._averaged(outputs, branch)
        if self.alpha is not None:
            x = x + (self.alpha * self.ratio).abs().to(x.dtype) * (branch - x)
            return (x if self.norm_out is None else self.norm_out(x).to(x.dtype)), outputs
        if self.config.dual_stream:
            outputs = (outputs[0] + branch,)
        if self.config.gru_bias is not None:
            x = self._gated(x, branch)
        elif self.config.copies is not None:
            written = self._copy_weights(x, "write").unsqueeze(-1) * branch.unsqueeze(-2)
            x = torch.matmul(self._copy_weights(x, "mix"), x) + written
        else:
            if self.skip is not None:
                x = x * self.skip.to(x.dtype)
            x = self.branch_gain * branch if self.skip_gain == 0 else self.skip_gain * x + self.branch_gain * branch
        return (x if self.norm_out is None else self.norm_out(x).to(x.dtype)), outputs

    def _copy_weights(self, x: Tensor, kind: str) -> Tensor:
        """What copies are read, written (..., n) or mixed with, (..., n, n) from column to row; x: (..., n, d)."""
        config, n = self.config, self.config.copies
        static = getattr(self, f"static_{kind}").to(x.dtype)
        square = (n, n) if kind == "mix" else (n,)
        if config.copies_iterations is not None:
            columns = {"read": slice(0, n), "write": slice(n, 2 * n), "mix": slice(2 * n, None)}[kind]
            flat, weight = x.flatten(-2), self.dynamic_map[:, columns]
            flat = flat * (flat.square().mean(dim=-1, keepdim=True) + config.norm_eps).rsqrt()
            scale = self.dynamic_scales[("read", "write", "mix").index(kind)].to(x.dtype)
            logits = scale * torch.matmul(flat.to(weight.dtype), weight).to(x.dtype) + static
            if kind != "mix":
                return logits.sigmoid() * (2 if kind == "write" else 1)
            logits = logits.unflatten(-1, square)
            for _ in range(config.copies_iterations):
                logits = logits.log_softmax(dim=-2).log_softmax(dim=-1)
            return logits.exp()
        weights = static.unflatten(0, square)
        if config.copies_dynamic:
            columns = {"read": slice(0, 1), "mix": slice(1, n + 1), "write": slice(n + 1, n + 2)}[kind]
            normed = F.layer_norm(x, x.shape[-1:], self.dynamic_norm.to(x.dtype), eps=config.norm_eps)
            weight = self.dynamic_map[:, columns]
            found = torch.matmul(normed.to(weight.dtype), weight).to(x.dtype).tanh()
            found = self.dynamic_scales[1 if kind == "write" else 0].to(x.dtype) * found
            weights = weights + (found if kind == "mix" else found.squeeze(-1))
        return weights.transpose(-1, -2) if kind == "mix" else weights

    def _averaged(self, outputs: Tensors, branch: Tensor) -> tuple[Tensor, Tensors]:
        """outputs: the sum of the block begun, the embedding, the sums of full blocks."""
        block = self.config.depth_block
        total = branch if self.index % block == 0 else outputs[0] + branch
        query = (self.depth_query * self.depth_gain).to(branch.dtype)
        sources = (*outputs[1:], total)
        norms = [(each.square().mean(dim=-1) + self.config.norm_eps).rsqrt() for each in sources]
        logits = [(each @ query) * norm for each, norm in zip(sources, norms, strict=True)]
        weights = torch.stack(logits, dim=-1).softmax(dim=-1)
        x = torch.stack(sources, dim=-1) @ weights.unsqueeze(-1)
        kept = (total, *outputs[1:])
        return x.squeeze(-1), (*kept, total) if (self.index + 1) % block == 0 else kept

    def _gated(self, x: Tensor, branch: Tensor) -> Tensor:
        def times(matrix: Tensor, inputs: Tensor) -> Tensor:
            return F.linear(inputs.to(matrix.dtype), matrix).to(x.dtype)

        reset, update, candidate = times(self.gate_branch, branch.relu()).chunk(3, dim=-1)
        from_reset, from_update = times(self.gate_stream, x).chunk(2, dim=-1)
        update = (update + from_update - self.gate_bias.to(x.dtype)).sigmoid()
        candidate = candidate + times(self.gate_reset, (reset + from_reset).sigmoid() * x)
        return x.lerp(candidate.tanh(), update)


def stream_starts(config: StablelmDecoderConfig, index: int) -> dict[str, Tensor]:
    """What the stream adds to a sub-layer, with its initial values."""
    n, d = config.copies, config.hidden_size
    if config.depth_block is not None:
        return {"depth_query": torch.zeros(d), "depth_gain": torch.ones(d)}
    if config.gru_bias is not None:
        shapes = {"gate_branch": (3 * d, d), "gate_stream": (2 * d, d), "gate_reset": (d, d)}
        drawn = {name: torch.randn(shape) * d**-0.5 for name, shape in shapes.items()}
        return drawn | {"gate_bias": torch.full((d,), float(config.gru_bias))}
    if n is None:
        return {}
    read = F.one_hot(torch.tensor(index % n), n).float()
    if config.copies_iterations is None:
        static = {"static_read": read, "static_mix": torch.eye(n).flatten(), "static_write": torch.ones(n)}
        dynamic = {
            "dynamic_norm": torch.ones(d),
            "dynamic_map": torch.zeros(d, n + 2),
            "dynamic_scales": torch.full((2,), 0.01),
        }
        return static | dynamic if config.copies_dynamic else static
    exchange = config.copies_exchange
    return {
        "static_read": torch.logit(0.5 * read + 0.5 / n),
        "static_mix": (math.log((1 - exchange) * (n - 1) / exchange) * torch.eye(n)).flatten(),
        "static_write": torch.zeros(n),
        "dynamic_map": torch.zeros(n * d, n * n + 2 * n),
        "dynamic_scales": torch.full((3,), 0.01),
    }


class Layer(GradientCheckpointingLayer):
    """An attention and a feed-forward sub-layer."""

    def __init__(self, config: StablelmDecoderConfig, index: int):
        super().__init__()
        self.attention = Sublayer(config, 2 * index)
        self.feedforward = Sublayer(config, 2 * index + 1)
        self.eps, width, count = config.norm_eps, config.hidden_size, index + 2
        last = index == config.num_hidden_layers - 1
        self.ways = 0 if not config.mixes_separately else 1 if last else 4
        self.mix = self.mix_hidden = self.mix_out = None
        if config.mixes_outputs or self.ways:
            self.mix = nn.Parameter(torch.zeros(max(1, self.ways) * count))
        if self.ways and config.mix_hidden_multiple:
            hidden, multiple = self.ways * count * (4 if last else 1), config.mix_hidden_multiple
            hidden = (hidden // multiple + 1) * multiple
            self.mix_hidden = nn.Parameter(torch.zeros(hidden, width))
            self.mix_out = nn.Parameter(torch.zeros(self.ways * count, hidden))
        self.parallel = config.parallel

    def forward(
        self,
        x: Tensor,
        outputs: Tensors,
        shared: Shared,
        first_value: Tensor | None = None,
        cache: Cache | None = None,
        weights_too: bool = False,
    ) -> tuple[Tensor, Tensors, Tensor, Tensor | None]:
        """x: the stream; outputs: what is kept of earlier layers -> both after this one, own values, weights."""
        attention, feedforward = self.attention, self.feedforward
        branch, value, weights = attention.body(
            attention.read(x, outputs, shared.dtype), shared, first_value, cache, weights_too
        )
        before = x
        x, outputs = attention.write(x, outputs, branch)
        read = feedforward.read(before if self.parallel else x, outputs, shared.dtype)
        x, outputs = feedforward.write(x, outputs, feedforward.body(read))
        if self.mix is not None:
            x, outputs = self._mixed(x, outputs)
        return x, outputs, value, weights

    def _mixed(self, x: Tensor, outputs: Tensors) -> tuple[Tensor, Tensors]:
        """outputs: the inputs of query, key and value where these are separate, the embedding, all layers' outputs."""
        assert self.mix is not None
        inputs = 3 if self.ways else 0
        outputs, weights = (*outputs, x), self.mix.to(x.dtype)
        kept = outputs[inputs:]
        if self.mix_hidden is not None and self.mix_out is not None:
            normed = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
            hidden = F.gelu(F.linear(normed.to(self.mix_hidden.dtype), self.mix_hidden))
            weights = weights + F.linear(hidden, self.mix_out).to(x.dtype)
        sums = [_weighted(each, kept) for each in weights.split(len(kept), dim=-1)]
        return sums[-1], (*sums[:-1], *kept) if len(sums) > 1 else outputs


def _weighted(weights: Tensor, outputs: Tensors) -> Tensor:
    """weights: (..., outputs), of each token or of all."""
    total = torch.zeros_like(outputs[-1])
    for weight, each in zip(weights.split(1, dim=-1), outputs, strict=True):
        total = total.addcmul(each, weight)
    return total


class StablelmDecoderPreTrainedModel(PreTrainedModel):
    config_class = StablelmDecoderConfig
    config: StablelmDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Norm):
            if module.weight is not None:
                init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.alpha is not None and module.slope is not None:
                init.constant_(module.alpha, module.slope)
        if isinstance(module, Sublayer) and module.gain is not None:
            init.zeros_(module.gain)
        if isinstance(module, Sublayer):
            for name, start in stream_starts(module.config, module.index).items():
                init.copy_(getattr(module, name), start)
        if isinstance(module, Sublayer) and module.skip is not None:
            init.ones_(module.skip)
        if isinstance(module, Attention) and module.head_scale is not None:
            init.ones_(module.head_scale)
        if isinstance(module, Attention):
            for parameter in (module.gate_bias, module.sink):
                if parameter is not None:
                    init.zeros_(parameter)
            for name in IDENTITY_GAINS if module.config.learned_identity else ():
                init.ones_(getattr(module, name))
            if module.config.value_gains:
                init.ones_(getattr(module, IDENTITY_GAINS[0]))
                init.zeros_(getattr(module, IDENTITY_GAINS[1]))
        if isinstance(module, Sublayer) and module.alpha is not None:
            init.constant_(module.alpha, 0.05 / module.ratio)
        if isinstance(module, Attention) and module.scale_qk is not None and module.ratio is not None:
            init.constant_(module.scale_qk, 1 / module.ratio)
        if isinstance(module, FeedForward):
            for factors in (module.scale_u, module.scale_v):
                if factors is not None:
                    init.ones_(factors)
        if isinstance(module, Layer) and module.mix is not None:
            # The newest output alone.
            count = len(module.mix) // max(1, module.ways)
            newest = F.one_hot(torch.tensor(count - 1), count).repeat(len(module.mix) // count)
            init.copy_(module.mix, newest.to(module.mix))
            if module.mix_hidden is not None and module.mix_out is not None:
                init.normal_(module.mix_hidden, std=module.mix_hidden.shape[1] ** -0.5)
                init.zeros_(module.mix_out)


class StablelmDecoderModel(StablelmDecoderPreTrainedModel):
    """The stack without the head: what `head` multiplies, (batch, seq, hidden_size)."""

    def __init__(self, config: StablelmDecoderConfig):
        super().__init__(config)
        width = config.hidden_size
        end = width + 2 * config.num_hidden_layers * (config.growth or 0)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width) if config.position_table else None
        self.norm_embedding = Norm(config, width) if config.norm_embedding else None
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        last = 2 * config.num_hidden_layers
        self.norm_final = Norm(config, end, reads=last) if config.norm_final else None
        self.projection = nn.Linear(end, width, bias=False) if config.growth is not None else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: (batch, q) or inputs_embeds: (batch, q, hidden_size), which follow what the cache holds.

        attention_mask: (batch, cached + q), 0 = padding, or (batch, 1, q, cached + q), True or 0.0 = seen;
        position_ids: (batch, q), for rotary and learned positions; by default tokens that are no padding are counted.
        `past_key_values`: the cache under its former name. Hidden states are the stream, after the embeddings and after
        each layer, before the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config, cache = self.config, past_key_values if cache is None else cache
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            use_cache, cache = False, None
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        embedded = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        shared, position_ids = self._shared(embedded, input_ids, attention_mask, position_ids, cache)
        x = self._embed(embedded, position_ids)
        states, all_weights, first_value = [x], [], None
        # Beside the stream: separate inputs or the block begun, and the embedding.
        outputs = (x,) * (4 if config.mixes_separately else 2 if config.depth_block is not None else 1)
        if config.copies is not None:
            x = x.unsqueeze(-2).repeat_interleave(config.copies, dim=-2)
        attentions = config.output_attentions if output_attentions is None else output_attentions
        for layer in self.layers:
            x, outputs, value, weights = layer(
                x, outputs, shared, first_value, cache=cache, weights_too=bool(attentions)
            )
            if config.first_value_share is not None and first_value is None:
                first_value = value
            states.append(x if config.copies is None else x.mean(dim=-2))
            all_weights.append(weights)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=self._finish(states[-1], outputs[0] if config.dual_stream else None, shared.dtype),
            hidden_states=tuple(states) if wanted else None,
            attentions=tuple(all_weights) if attentions else None,
            **{CACHE: cache},
        )

    def _embed(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """The stream at its start."""
        x = at_least_fp32(embedded) * self.config.embedding_scale
        if self.position is not None:
            x = x + self.position(position_ids).to(x.dtype)
        if self.norm_embedding is not None:
            x = self.norm_embedding(x)
        return F.dropout(x, self.config.dropout, self.training)

    def _finish(self, x: Tensor, dual: Tensor | None, dtype: torch.dtype) -> Tensor:
        end = x if dual is None else dual
        end = end if self.norm_final is None else self.norm_final(end)
        x = (end if dual is None else x + end).to(dtype)
        if self.projection is not None:
            x = self.projection(x)
        return x if self.config.head_scale == 1 else x * self.config.head_scale

    def _shared(
        self,
        embedded: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Shared, Tensor]:
        """And the position_ids, (batch or 1, q)."""
        config, device, q = self.config, embedded.device, embedded.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        layers = () if cache is None else cache.layers
        # A static cache hands out all its rows, those to come too.
        k = (getattr(layers[0], "max_cache_len", None) if layers else None) or past + q
        valid = _valid(attention_mask, past + q, k)
        ends = None
        if config.document_end is not None:
            ends = self._ends(input_ids, None if valid is None else valid[:, past : past + q], cache, past)
        index = torch.arange(k, device=device)[None]  # (1, k)
        counted = index if valid is None else (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        places = (counted[:, past : past + q], counted)
        allowed = None
        given = attention_mask is not None and attention_mask.ndim == 4
        if given or valid is not None or ends is not None or k != past + q or (past and q > 1):
            allowed = _allowed(index, past, q, valid, ends, attention_mask if given else None)
        if ends is not None and config.position_table:
            position_ids = _document_places(ends)[:, past:]
        elif position_ids is None:
            position_ids = places[0]
        self._check_positions(position_ids, past + q)
        needs_places = config.attention_innovations is not None or config.attention_correlations is not None
        shared = Shared(
            embedded.dtype,
            self._rotation(position_ids, embedded.dtype),
            allowed,
            None if config.alibi_slopes is None else _slopes(config.alibi_slopes, places, allowed),
            places if needs_places else None,
            None if ends is None else ends[:, past:],
            {"cache_position": index[0, past : past + q]},
        )
        return shared, position_ids

    def _ends(self, input_ids: Tensor | None, valid: Tensor | None, cache: Cache | None, past: int) -> Tensor:
        """(batch, past + q) bool: the tokens after which a document begins; padding counts as an end."""
        if input_ids is None:
            raise ValueError("attention stays within documents here, whose ends only input_ids show: give input_ids")
        ends = input_ids == self.config.document_end
        if valid is not None:
            ends = ends | ~valid
        if cache is None or not past:
            return ends
        keys = getattr(cache.layers[0], "keys", None)
        if keys is None or keys.shape[-2] < past or keys.shape[-1] != self.config.head_dim + 1:
            raise ValueError("attention stays within documents here, which this kind of cache does not keep apart")
        return torch.cat((keys[:, 0, :past, -1].to(ends.device) > 0.5, ends), dim=1)

    def _check_positions(self, position_ids: Tensor, length: int) -> None:
        rows = self.config.max_position_embeddings
        if self.position is not None and length > rows and int(position_ids.max()) >= rows:
            raise ValueError(f"a sequence is longer than the {rows} positions that the model has: shorten it")

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if config.rotary_base is None:
            return None
        device, width = position_ids.device, config.head_dim
        exact = torch.float32 if device.type == "mps" else torch.float64
        exponents = torch.arange(0, width, 2, dtype=exact, device=device) / width
        angles = position_ids[:, None, :, None].to(exact) * config.rotary_base**-exponents
        dtype = torch.promote_types(dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _valid(attention_mask: Tensor | None, length: int, k: int) -> Tensor | None:
    """(batch, k) bool: the keys that are no padding; None: all."""
    if attention_mask is None or attention_mask.ndim == 4:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape} must cover the {length} tokens cached and given")
    valid = attention_mask[:, :k].bool()
    if not torch.compiler.is_compiling() and bool(valid[:, :length].all()):
        return None
    return F.pad(valid, (0, k - valid.shape[1]))


def _allowed(
    index: Tensor, past: int, q: int, valid: Tensor | None, ends: Tensor | None, given: Tensor | None
) -> Tensor:
    """(batch or 1, 1, q, k) bool; each query sees itself at least, so that padding has numbers too."""
    key, query = index[:, None, None, :], index[:, None, past : past + q, None]
    if given is not None:
        seen = given if given.dtype == torch.bool else given == 0
        seen = F.pad(seen, (0, index.shape[1] - seen.shape[-1])) & (key <= query)
    else:
        seen = key <= query
    if valid is not None:
        seen = seen & valid[:, None, None, :]
    if ends is not None:
        number = ends.long().cumsum(dim=1) - ends.long()  # of a token's document
        of_keys = F.pad(number, (0, index.shape[1] - number.shape[1]), value=-1)
        seen = seen & (of_keys[:, None, None, :] == number[:, None, past:, None])
    return seen | (key == query)


def _slopes(slopes: list[float], places: tuple[Tensor, Tensor], allowed: Tensor | None) -> Tensor:
    """(batch or 1, heads, q, k): -slope times distance, -inf for keys that are not seen."""
    query, key = places[0][:, None, :, None], places[1][:, None, None, :]
    distance = (query - key).float()
    bias = -torch.tensor(slopes, device=distance.device)[:, None, None] * distance
    return bias.masked_fill(distance < 0 if allowed is None else ~allowed, -math.inf)


def _document_places(ends: Tensor) -> Tensor:
    """(batch, k): how many tokens of its document come before each."""
    index = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    starts = torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), dim=1)
    return index - (index * starts).cummax(dim=1).values


class StablelmDecoderForCausalLM(StablelmDecoderPreTrainedModel, GenerationMixin):
    """The stack with its head."""

    _tied_weights_keys = {"head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: StablelmDecoderConfig):
        super().__init__(config)
        self.model = StablelmDecoderModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: the model makes its own of it, for caches of any kind."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels: (batch, q), as input_ids, -100 = ignored; logits_to_keep: of how many last tokens, 0 = all."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            past_key_values=past_key_values,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
