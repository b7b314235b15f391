"""A decoder-only language model with the streams, norms and attention that stablelm trains, for transformers >= 5.2.

Needs torch and transformers alone; the folder that holds it is loaded by
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. The configuration names mechanisms and numbers;
with its defaults the model is a plain pre-norm transformer. The stream and the statistics of norms are kept in at least
fp32, whatever the dtype of the weights.
"""

import math
from typing import Any, NamedTuple

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

# Versions before the rename call the cache past_key_values, in arguments and outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

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
    "learned_value_weights": False,
    "document_end": None,
    "attention_innovations": None,
    "norm_embedding": False,
    "norm_before_body": True,
    "norm_before_output": False,
    "norm_on_branch": False,
    "norm_after_write": False,
    "norm_final": True,
    "norm_centred": False,
    "norm_slope": None,
    "norm_slope_attention": None,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "norm_eps_scales": None,
    "skip_gain": 1.0,
    "branch_gain": 1.0,
    "learned_gain": False,
    "growth": None,
    "mixes_outputs": False,
    "mix_dilation": 1,
    "mix_period": 1,
    "embedding_scale": 1.0,
    "embedding_gain": None,
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
    `first_value_share`: share of the first layer's values in those of the later layers, with `learned_value_weights` at
    the start of learned weights of these and of the own values; `document_end`: token whose documents attention does
    not cross; `attention_innovations`: see `decay_of`, from before the first layer to after the last. Norms: `norm_*`
    say where; `norm_centred`: the mean is subtracted; `norm_slope`: tanh(slope x) in place of a norm, with a learned
    slope that starts there, in attention sub-layers at `norm_slope_attention` if it is not None; `norm_eps_scales`:
    factors of `norm_eps` in front of each sub-layer, and last at the end. Stream: x <- skip_gain x + branch_gain f(x),
    times a learned gain with `learned_gain`; `growth`: the output of that width is appended to x instead;
    `mixes_outputs`: after each `mix_period`-th layer x is a learned sum of every `mix_dilation`-th of the embeddings
    and all layers' outputs, counted back from its own. `embedding_scale` and `head_scale` multiply the embeddings and
    what the head reads; `embedding_gain`: start of a learned factor of the token embeddings. Feed-forward: `hidden_act`
    by transformers' name, of the gate if `gated`; `negative_slope`: a leaky relu in its place; times
    `activation_scale`.
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


class Norm(nn.Module):
    """Over the last dimension; returns at least fp32."""

    def __init__(
        self,
        config: StablelmDecoderConfig,
        width: int,
        *,
        of_heads: bool = False,
        reads: int | None = None,
        attention: bool = False,
    ):
        super().__init__()
        scales = config.norm_eps_scales
        self.eps = config.norm_eps * (1.0 if scales is None or reads is None else scales[reads])
        slope = config.norm_slope_attention if attention else None
        self.slope = None if of_heads else config.norm_slope if slope is None else slope
        self.centred = config.norm_centred and not of_heads
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias and not of_heads else None
        self.alpha = nn.Parameter(torch.full((1,), self.slope)) if self.slope is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.alpha is not None:
            x = torch.tanh(self.alpha.to(x.dtype) * x) * weight
            return x if bias is None else x + bias
        if self.centred:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
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


def decay_of(
    innovations: tuple[float, float], places: tuple[Tensor, Tensor], allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(bias on the logits, factor of each row's output) that make attention a fixed decay when the logits are 0.

    He et al., Deep Transformers without Shortcuts, ICLR 2023: the matrix L_l L_{l-1}^-1 of the Cholesky factors of
    exp(-gamma |i - j|) after and before the layer, gamma given by the innovation a = sqrt(1 - exp(-2 gamma)) of an
    AR(1) process. (batch or 1, 1, q, k) and (.., q, 1).
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
    rows = logs.exp().sum(dim=-1, keepdim=True)
    return logs - rows.log(), rows


class Attention(nn.Module):
    """Causal self-attention; query head i reads key/value head i // (heads / key/value heads)."""

    def __init__(self, config: StablelmDecoderConfig, d_in: int, d_out: int, layer: int):
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        width, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        rank, bias = config.low_rank, config.bias

        def first(d_out: int) -> nn.Module:
            return nn.Linear(d_in, d_out, bias=bias) if rank is None else LowRank(d_in, rank, d_out, bias)

        self.query, self.key, self.value = first(width), first(d_kv), first(d_kv)
        self.norm_query = Norm(config, self.head_dim, of_heads=True) if config.qk_norm else None
        self.norm_key = Norm(config, self.head_dim, of_heads=True) if config.qk_norm else None
        self.norm_inner = Norm(config, width, attention=True) if config.norm_before_output else None
        self.output = nn.Linear(width, d_out, bias=bias)

    def forward(
        self,
        x: Tensor,
        shared: Shared,
        first_value: Tensor | None,
        value_weights: Tensor | None,
        cache: Cache | None,
        weights_too: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (batch, q, d_in) -> its branch, its values (batch, q, d_kv), and the attention weights if asked for.

        value_weights: (2,), of the first layer's values and of the own, if they are learned.
        """
        query, key, own_value = self.query(x), self.key(x), self.value(x)
        share, value = self.config.first_value_share, own_value
        if share is not None and first_value is not None:
            of_first, of_own = (share, 1 - share) if value_weights is None else value_weights.to(own_value.dtype)
            value = of_own * own_value + of_first * first_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        if self.norm_query is not None and self.norm_key is not None:
            query, key = self.norm_query(query).to(query.dtype), self.norm_key(key).to(key.dtype)
        if shared.rotation is not None:
            query, key = rotate(query, *shared.rotation), rotate(key, *shared.rotation)
        if cache is not None:
            key, value = self._cached(key, value, shared, cache)
        bias, rows = shared.bias, None
        if self.config.attention_innovations is not None and shared.places is not None:
            before, after = self.config.attention_innovations[self.layer : self.layer + 2]
            bias, rows = decay_of((before, after), shared.places, shared.allowed)
        mixed, weights = self._average(query, key, value, shared.allowed, bias, weights_too)
        if rows is not None:
            mixed = mixed * rows.to(mixed.dtype)
        mixed = mixed.transpose(1, 2).flatten(-2)
        if self.norm_inner is not None:
            mixed = self.norm_inner(mixed).to(mixed.dtype)
        return self.output(mixed), own_value, weights

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
        if not cap and not weights_too and config._attn_implementation != "eager":
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
        weights = F.dropout(logits.softmax(dim=-1).to(value.dtype), dropout)
        return weights @ value, weights


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns feature i of each head against feature i + head_dim / 2; x: (batch, heads, q, head_dim)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """fc2(act(fc1 x)), or with a gate fc2(act(gate x) * fc1 x)."""

    def __init__(self, config: StablelmDecoderConfig, d_in: int, d_out: int):
        super().__init__()
        width = config.intermediate_size
        self.fc1 = nn.Linear(d_in, width, bias=config.bias)
        self.gate = nn.Linear(d_in, width, bias=config.bias) if config.gated else None
        slope = config.negative_slope
        self.act = ACT2FN[config.hidden_act] if slope is None else nn.LeakyReLU(slope)
        self.scale = config.activation_scale
        self.norm_inner = Norm(config, width) if config.norm_before_output else None
        self.fc2 = nn.Linear(width, d_out, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        hidden = self.act(hidden) if self.gate is None else self.act(self.gate(x)) * hidden
        if self.scale != 1:
            hidden = hidden * self.scale
        if self.norm_inner is not None:
            hidden = self.norm_inner(hidden).to(x.dtype)
        return self.fc2(hidden)


class Sublayer(nn.Module):
    """A body with its norms and its way onto the stream; `index` counts both kinds."""

    def __init__(self, config: StablelmDecoderConfig, index: int):
        super().__init__()
        self.skip_gain, self.branch_gain, self.grows = config.skip_gain, config.branch_gain, config.growth is not None
        growth = config.growth or 0
        d_in, d_out = config.hidden_size + index * growth, growth or config.hidden_size
        attention = index % 2 == 0
        self.norm_in = Norm(config, d_in, reads=index, attention=attention) if config.norm_before_body else None
        self.body = FeedForward(config, d_in, d_out) if index % 2 else Attention(config, d_in, d_out, index // 2)
        self.norm_branch = Norm(config, d_out, attention=attention) if config.norm_on_branch else None
        self.dropout = nn.Dropout(config.dropout)
        self.gain = nn.Parameter(torch.zeros(1)) if config.learned_gain else None
        self.norm_out = Norm(config, d_out, attention=attention) if config.norm_after_write else None

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (x if self.norm_in is None else self.norm_in(x)).to(dtype)

    def write(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream after the branch has joined it, in the stream's dtype."""
        if self.norm_branch is not None:
            branch = self.norm_branch(branch)
        branch = self.dropout(branch)
        if self.gain is not None:
            branch = branch * self.gain.to(branch.dtype)
        branch = branch.to(x.dtype)
        if self.grows:
            return torch.cat((x, branch), dim=-1)
        x = self.branch_gain * branch if self.skip_gain == 0 else self.skip_gain * x + self.branch_gain * branch
        return x if self.norm_out is None else self.norm_out(x).to(x.dtype)


class Layer(GradientCheckpointingLayer):
    """An attention and a feed-forward sub-layer."""

    def __init__(self, config: StablelmDecoderConfig, index: int):
        super().__init__()
        self.attention = Sublayer(config, 2 * index)
        self.feedforward = Sublayer(config, 2 * index + 1)
        mixes = config.mixes_outputs and (index + 1) % config.mix_period == 0
        self.dilation = config.mix_dilation
        self.mix = nn.Parameter(torch.zeros((index + 1) // self.dilation + 1)) if mixes else None
        learned = config.learned_value_weights and index > 0
        self.value_weights = nn.Parameter(torch.full((2,), 0.5)) if learned else None
        self.value_share = config.first_value_share

    def forward(
        self,
        x: Tensor,
        outputs: tuple[Tensor, ...],
        shared: Shared,
        first_value: Tensor | None = None,
        cache: Cache | None = None,
        weights_too: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x: the stream; outputs: those of all layers before -> (the stream, own output, own values, weights)."""
        attention, feedforward = self.attention, self.feedforward
        branch, value, weights = attention.body(
            attention.read(x, shared.dtype), shared, first_value, self.value_weights, cache, weights_too
        )
        x = attention.write(x, branch)
        x = output = feedforward.write(x, feedforward.body(feedforward.read(x, shared.dtype)))
        if self.mix is not None:
            mix = self.mix.to(x.dtype)
            x = torch.zeros_like(output)
            whole = (*outputs, output)
            read = whole[(len(whole) - 1) % self.dilation :: self.dilation]
            for weight, each in zip(mix.unbind(), read, strict=True):
                x = x.addcmul(each, weight)
        return x, output, value, weights


class EmbeddingGain(nn.Module):
    """A learned factor of the token embeddings."""

    def __init__(self, start: float):
        super().__init__()
        self.start = start
        self.embedding_gain = nn.Parameter(torch.full((1,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.embedding_gain.to(x.dtype)


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
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.alpha is not None and module.slope is not None:
                init.constant_(module.alpha, module.slope)
        if isinstance(module, EmbeddingGain):
            init.constant_(module.embedding_gain, module.start)
        if isinstance(module, Sublayer) and module.gain is not None:
            init.zeros_(module.gain)
        if isinstance(module, Layer) and module.mix is not None:
            # The newest output alone.
            init.copy_(module.mix, F.one_hot(torch.tensor(len(module.mix) - 1), len(module.mix)).to(module.mix))
        if isinstance(module, Layer) and module.value_weights is not None:
            share = module.value_share
            init.copy_(module.value_weights, torch.tensor([share, 1 - share]).to(module.value_weights))


class StablelmDecoderModel(StablelmDecoderPreTrainedModel):
    """The stack without the head: what `head` multiplies, (batch, seq, hidden_size)."""

    def __init__(self, config: StablelmDecoderConfig):
        super().__init__(config)
        width = config.hidden_size
        end = width + 2 * config.num_hidden_layers * (config.growth or 0)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width) if config.position_table else None
        self.scaling = EmbeddingGain(config.embedding_gain) if config.embedding_gain is not None else None
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
        states, all_weights, outputs, first_value = [x], [], (x,), None
        attentions = config.output_attentions if output_attentions is None else output_attentions
        for layer in self.layers:
            x, output, value, weights = layer(
                x, outputs, shared, first_value, cache=cache, weights_too=bool(attentions)
            )
            if config.mixes_outputs:
                outputs = (*outputs, output)
            if config.first_value_share is not None and first_value is None:
                first_value = value
            states.append(x)
            all_weights.append(weights)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=self._finish(x, shared.dtype),
            hidden_states=tuple(states) if wanted else None,
            attentions=tuple(all_weights) if attentions else None,
            **{CACHE: cache},
        )

    def _embed(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """The stream at its start."""
        x = at_least_fp32(embedded) * self.config.embedding_scale
        if self.scaling is not None:
            x = self.scaling(x)
        if self.position is not None:
            x = x + self.position(position_ids).to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        return x if self.norm_embedding is None else self.norm_embedding(x)

    def _finish(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = (x if self.norm_final is None else self.norm_final(x)).to(dtype)
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
        needs_places = config.attention_innovations is not None
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
