"""What a model of another program is in our terms: keys of the section `model`, and where each tensor comes from.

Read from config.json as transformers reads it for the same `model_type`: its names, its defaults, and only the keys
that change the function. What ours cannot compute is refused by name.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from stablelm.errors import ConfigError
from stablelm.export.importing.source_folder import Origin, SourceFolder
from stablelm.export.importing.source_keys import SourceKeys
from stablelm.printable import few

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class SourceModel:
    """`keys`: of the section `model`, those of attention in `attention`; `positions`: its longest sequence.

    `tensors`: where each of our parameters comes from, None for biases that the source lacks. `eos`: ids that end a
    text, none if it does not say.
    """

    keys: Mapping[str, Any]
    attention: Mapping[str, Any]
    tensors: Mapping[str, Origin | None]
    positions: int
    eos: tuple[int, ...]


class Family(NamedTuple):
    """Models of one `model_type`.

    `architectures`: with a head, then without; `prefix`: of names in a model with a head; `table`: the rest of the
    embedding's name; `layers`: the key of their number; `unused`: endings of tensors that are no parameters; `read`
    takes the keys and the longest sequence that is wanted, None for all positions.
    """

    model_type: str
    architectures: tuple[str, str]
    prefix: str
    table: str
    layers: str
    unused: tuple[str, ...]
    read: Callable[[SourceKeys, int | None], SourceModel]


def describe(folder: SourceFolder, max_seq_len: int | None = None) -> SourceModel:
    """The model of a folder; `max_seq_len`: the longest sequence that is wanted, None for all its positions.

    Raises ConfigError where it is of another kind, or its tensors do not fit its config.json.
    """
    keys = SourceKeys(folder)
    kind = keys.word("model_type", "")
    if kind not in FAMILIES:
        raise ConfigError(f"{keys.path}: model_type={kind!r:.60} cannot be imported; {', '.join(FAMILIES)} can")
    family = FAMILIES[kind]
    named = keys.values.get("architectures") or list(family.architectures)
    if not isinstance(named, list) or named[0] not in family.architectures:
        raise keys.wrong("architectures", f"is not a language model; {family.architectures[0]} can be imported")
    if keys.values.get("quantization_config"):
        raise ConfigError(f"{keys.path} has a quantization_config; import the model as it was before")
    layers = keys.size(family.layers)
    if layers > len(folder.shapes):
        raise keys.wrong(family.layers, f"is more than the {len(folder.shapes)} tensors of the folder")
    found = family.read(keys, max_seq_len)
    if f"{family.prefix}{family.table}" not in folder.shapes and family.table in folder.shapes:
        found = replace(found, tensors={name: _bare(each, family.prefix) for name, each in found.tensors.items()})
    _check(folder, found, family)
    return found


def _bare(origin: Origin | None, prefix: str) -> Origin | None:
    """The name in a model that was saved without its head."""
    return origin and replace(origin, name=origin.name.removeprefix(prefix))


def _check(folder: SourceFolder, found: SourceModel, family: Family) -> None:
    """ConfigError unless the folder holds each tensor in its shape, and no others."""
    origins = [origin for origin in found.tensors.values() if origin is not None]
    missing = sorted({origin.name for origin in origins} - folder.shapes.keys())
    if missing:
        raise ConfigError(
            f"{folder.path} lacks tensors that its config.json asks for: {few(missing)}; download it again"
        )
    for origin in origins:
        if folder.shapes[origin.name] != origin.shape:
            held, asked = (list(shape) for shape in (folder.shapes[origin.name], origin.shape))
            raise ConfigError(f"{folder.path}: {origin.name} has shape {held}, but config.json makes it {asked}")
    used = {origin.name for origin in origins} | ({HEAD} if found.keys["tie_embeddings"] else set())
    others = sorted(name for name in folder.shapes if name not in used and not name.endswith(family.unused))
    if others:
        raise ConfigError(
            f"{folder.path} holds tensors that a {family.architectures[0]} does not have: {few(others)}; import a "
            "plain model, with adapters merged into it"
        )


class _Relative(NamedTuple):
    """How one of LLaMA's relatives reads its keys.

    `kv_heads` (None: as many as heads), `head_dim` (None: hidden_size / heads), `positions`: their defaults; `biases`:
    whether query, key and value have them (None: `attention_bias` says so of all maps of attention); `window`: the key
    that must be true for `sliding_window` to count, empty if it always does, None if there is none.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    positions: int = 1 << 15
    biases: bool | None = None
    window: str | None = "use_sliding_window"
    norms_of_heads: bool = False


def _llama(keys: SourceKeys, max_seq_len: int | None, *, relative: _Relative) -> SourceModel:
    """LLaMA and its relatives: rmsnorm, rotary positions, silu with a gate."""
    width, heads, layers = keys.size("hidden_size"), keys.size("num_attention_heads"), keys.size("num_hidden_layers")
    kv_heads = keys.size("num_key_value_heads", relative.kv_heads or heads)
    d_head = keys.size("head_dim", relative.head_dim or max(1, width // heads))
    if d_head * heads != width:
        raise ConfigError(
            f"{keys.path}: num_attention_heads={heads} of head_dim={d_head} make {heads * d_head} features, and our "
            f"attention is as wide as the stream, hidden_size={width}; import a model in which they are equal"
        )
    positions = max_seq_len or keys.size("max_position_embeddings", relative.positions)
    if relative.window == "" or (relative.window is not None and keys.flag(relative.window, False)):
        keys.refuse_window(positions)
    asked = keys.flag("attention_bias", False)
    first, output = (asked, asked) if relative.biases is None else (relative.biases, False)
    biases = _Biases(first, output, relative.window is None and keys.flag("mlp_bias", False))
    sizes = _Sizes(keys.size("vocab_size"), width, kv_heads * d_head, keys.size("intermediate_size"), d_head, layers)
    tied = keys.flag("tie_word_embeddings", False)
    return SourceModel(
        keys={
            "n_layers": layers,
            "d_model": width,
            "n_heads": heads,
            "kv_heads": kv_heads,
            "d_ff": sizes.hidden,
            "vocab_size": sizes.vocabulary,
            "max_seq_len": positions,
            "tie_embeddings": tied,
            "bias": any(biases),
            "norm": "rmsnorm",
            "norm_eps": keys.number("rms_norm_eps", 1e-6),
            "activation": keys.activation("hidden_act", "silu", gated=True),
        },
        attention={
            "position": "rope",
            "rope_base": keys.rope_base(positions),
            **({"qk_norm": True} if relative.norms_of_heads else {}),
        },
        tensors=dict(_llama_tensors(sizes, biases, tied, relative.norms_of_heads)),
        positions=positions,
        eos=keys.eos(),
    )


class _Biases(NamedTuple):
    """Which maps have them."""

    first: bool
    output: bool
    feedforward: bool


class _Sizes(NamedTuple):
    vocabulary: int
    width: int
    key_value: int
    hidden: int
    head: int
    layers: int


def _llama_tensors(
    sizes: _Sizes, biases: _Biases, tied: bool, norms_of_heads: bool
) -> Iterator[tuple[str, Origin | None]]:
    vocabulary, width, key_value, hidden, head, _ = sizes
    yield "embedding.weight", Origin("model.embed_tokens.weight", (vocabulary, width))
    for layer in range(sizes.layers):
        attention, feedforward = f"layers.{layer}.attention", f"layers.{layer}.feedforward"
        source = f"model.layers.{layer}"
        for ours, theirs, rows, columns, has_bias in (
            (f"{attention}.body.query", "self_attn.q_proj", width, width, biases.first),
            (f"{attention}.body.key", "self_attn.k_proj", key_value, width, biases.first),
            (f"{attention}.body.value", "self_attn.v_proj", key_value, width, biases.first),
            (f"{attention}.body.output", "self_attn.o_proj", width, width, biases.output),
            (f"{feedforward}.body.fc1", "mlp.up_proj", hidden, width, biases.feedforward),
            (f"{feedforward}.body.gate", "mlp.gate_proj", hidden, width, biases.feedforward),
            (f"{feedforward}.body.fc2", "mlp.down_proj", width, hidden, biases.feedforward),
        ):
            yield f"{ours}.weight", Origin(f"{source}.{theirs}.weight", (rows, columns))
            if any(biases):
                yield f"{ours}.bias", Origin(f"{source}.{theirs}.bias", (rows,)) if has_bias else None
        if norms_of_heads:
            yield f"{attention}.body.norm_query.weight", Origin(f"{source}.self_attn.q_norm.weight", (head,))
            yield f"{attention}.body.norm_key.weight", Origin(f"{source}.self_attn.k_norm.weight", (head,))
        yield f"{attention}.norm_in.weight", Origin(f"{source}.input_layernorm.weight", (width,))
        yield f"{feedforward}.norm_in.weight", Origin(f"{source}.post_attention_layernorm.weight", (width,))
    yield "norm_final.weight", Origin("model.norm.weight", (width,))
    if not tied:
        yield "head.weight", Origin(HEAD, (vocabulary, width))


def _gpt2(keys: SourceKeys, max_seq_len: int | None) -> SourceModel:
    width, heads, layers = keys.size("n_embd"), keys.size("n_head"), keys.size("n_layer")
    hidden, positions = keys.size("n_inner", 4 * width), keys.size("n_positions", 1024)
    if width % heads:
        raise keys.wrong("n_embd", f"is not divisible by n_head={heads}")
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if keys.flag(name, usual) != usual:
            raise keys.wrong(name, "scales logits as ours are not; import a model with the other value")
    if keys.flag("add_cross_attention", False):
        raise keys.wrong("add_cross_attention", "makes it no decoder-only model")
    tied, vocabulary = keys.flag("tie_word_embeddings", True), keys.size("vocab_size")
    return SourceModel(
        keys={
            "n_layers": layers,
            "d_model": width,
            "n_heads": heads,
            "kv_heads": heads,
            "d_ff": hidden,
            "vocab_size": vocabulary,
            "max_seq_len": positions,
            "tie_embeddings": tied,
            "bias": True,
            "norm": "layernorm",
            "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
            "activation": keys.activation("activation_function", "gelu_new", gated=False),
        },
        attention={"position": "learned"},
        tensors=dict(_gpt2_tensors(_Sizes(vocabulary, width, width, hidden, width // heads, layers), positions, tied)),
        positions=positions,
        eos=keys.eos(),
    )


def _gpt2_tensors(sizes: _Sizes, positions: int, tied: bool) -> Iterator[tuple[str, Origin]]:
    """Its maps are (d_in, d_out), and query, key and value are one."""
    width, hidden = sizes.width, sizes.hidden
    yield "embedding.weight", Origin("transformer.wte.weight", (sizes.vocabulary, width))
    yield "position.weight", Origin("transformer.wpe.weight", (positions, width))
    for layer in range(sizes.layers):
        attention, feedforward = f"layers.{layer}.attention", f"layers.{layer}.feedforward"
        source = f"transformer.h.{layer}"
        for ours, theirs in ((attention, "ln_1"), (feedforward, "ln_2")):
            for part in ("weight", "bias"):
                yield f"{ours}.norm_in.{part}", Origin(f"{source}.{theirs}.{part}", (width,))
        for index, name in enumerate(("query", "key", "value")):
            columns = (index * width, (index + 1) * width)
            maps = Origin(f"{source}.attn.c_attn.weight", (width, 3 * width), columns, transposed=True)
            yield f"{attention}.body.{name}.weight", maps
            yield f"{attention}.body.{name}.bias", Origin(f"{source}.attn.c_attn.bias", (3 * width,), columns)
        for ours, theirs, d_in, d_out in (
            (f"{attention}.body.output", "attn.c_proj", width, width),
            (f"{feedforward}.body.fc1", "mlp.c_fc", width, hidden),
            (f"{feedforward}.body.fc2", "mlp.c_proj", hidden, width),
        ):
            yield f"{ours}.weight", Origin(f"{source}.{theirs}.weight", (d_in, d_out), transposed=True)
            yield f"{ours}.bias", Origin(f"{source}.{theirs}.bias", (d_out,))
    for part in ("weight", "bias"):
        yield f"norm_final.{part}", Origin(f"transformer.ln_f.{part}", (width,))
    if not tied:
        yield "head.weight", Origin(HEAD, (sizes.vocabulary, width))


def _named(model_type: str, name: str, relative: _Relative) -> Family:
    return Family(
        model_type,
        (f"{name}ForCausalLM", f"{name}Model"),
        prefix="model.",
        table="embed_tokens.weight",
        layers="num_hidden_layers",
        unused=("rotary_emb.inv_freq",),
        read=partial(_llama, relative=relative),
    )


_FAMILIES = (
    _named("llama", "Llama", _Relative(positions=2048, window=None)),
    _named("mistral", "Mistral", _Relative(kv_heads=8, positions=1 << 17, biases=False, window="")),
    _named("qwen2", "Qwen2", _Relative(kv_heads=32, biases=True)),
    _named("qwen3", "Qwen3", _Relative(kv_heads=32, head_dim=128, norms_of_heads=True)),
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        prefix="transformer.",
        table="wte.weight",
        layers="n_layer",
        unused=(".attn.bias", ".attn.masked_bias"),
        read=_gpt2,
    ),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}
