"""Which points of the method space make sense together: every refusal has a reason and a mend (torch-free)."""

from collections.abc import Callable
from dataclasses import dataclass

from stablelm.config.schema import ModelConfig

# These set the size of the branch by the size of the weights, which a gain that starts at 1 undoes.
_SIZED_INITS = ("deepscale", "magneto", "deepnet", "unit", "tfixup", "completep", "orthogonal")


@dataclass(frozen=True)
class Rule:
    """A combination that is refused: when, and the sentence that says why and what to do instead."""

    broken: Callable[[ModelConfig], bool]
    keys: tuple[str, ...]
    reason: str


RULES = (
    Rule(
        lambda m: m.stream == "deepnorm" and m.placement != "post",
        ("model.stream", "model.placement"),
        "deepnorm multiplies the skip at every sub-layer, so without a norm after the sum the stream explodes; "
        "use model.placement=post, or model.stream=scaled",
    ),
    Rule(
        lambda m: m.stream == "concat" and m.placement == "post",
        ("model.stream", "model.placement"),
        "a concatenated stream has no sum to normalise; use model.placement=pre, sub or peri",
    ),
    Rule(
        lambda m: m.stream == "rezero" and m.placement == "peri",
        ("model.stream", "model.placement"),
        "a norm on the branch and a learned gain that starts at zero both set the branch's size; "
        "use model.placement=none or pre, or model.stream=residual",
    ),
    Rule(
        lambda m: m.stream == "skipless" and m.attention.shaping != "espa",
        ("model.stream", "model.attention.shaping"),
        "without a skip, attention that starts uniform makes all tokens equal within a few layers; "
        "use model.attention.shaping=espa, or a stream with a skip",
    ),
    Rule(
        lambda m: m.attention.shaping == "espa" and (m.stream != "skipless" or m.init != "orthogonal"),
        ("model.attention.shaping", "model.stream", "model.init"),
        "the decay of espa is solved for a stack without skips and for orthogonal weights with zero queries; "
        "use model.stream=skipless and model.init=orthogonal, or model.attention.shaping=none",
    ),
    Rule(
        lambda m: m.init == "orthogonal" and m.attention.shaping != "espa",
        ("model.init", "model.attention.shaping"),
        "orthogonal starts with zero queries, which only espa's attention can learn from; "
        "use model.init=fan_in, or model.method=e_spa",
    ),
    Rule(
        lambda m: m.stream == "skipless" and m.placement not in ("none", "pre"),
        ("model.stream", "model.placement"),
        "espa's decay leaves the size of the stream alone, which norms at other places would not; "
        "use model.placement=none or pre",
    ),
    Rule(
        lambda m: m.attention.shaping == "espa" and (m.attention.position == "alibi" or bool(m.attention.qk_norm)),
        ("model.attention.shaping", "model.attention.position", "model.attention.qk_norm"),
        "espa is itself a bias on the logits and starts with queries of zero, which a norm cannot scale; "
        "use model.attention.position=none, rope or learned, and no qk_norm",
    ),
    Rule(
        lambda m: m.reparam == "sigma" and m.sigma.gamma == "one" and m.init in _SIZED_INITS,
        ("model.sigma.gamma", "model.init"),
        "a spectral norm of 1 at the start erases the sizes that this initialisation sets; "
        "use model.sigma.gamma=spectral, or model.init=xavier, fan_in or gpt2",
    ),
    Rule(
        lambda m: m.reparam == "sigma" and m.attention.shaping == "espa",
        ("model.reparam", "model.attention.shaping"),
        "espa's queries start at zero, and a zero matrix has no spectral norm to divide by; use model.reparam=none",
    ),
    Rule(
        lambda m: m.activation == "tailored" and m.init not in ("orthogonal", "unit", "fan_in"),
        ("model.activation", "model.init"),
        "the tailored slope is solved for activations of unit variance; "
        "use model.init=fan_in, unit or orthogonal, or model.activation=relu",
    ),
    Rule(
        lambda m: m.init == "completep" and m.stream == "concat",
        ("model.init", "model.stream"),
        "completep's rates are derived for a sum over layers; use model.init=fan_in or unit with model.stream=concat",
    ),
    Rule(
        lambda m: m.attention.value_residual is True and m.attention.shaping == "espa",
        ("model.attention.value_residual", "model.attention.shaping"),
        "mixing in the first layer's values is a skip, which espa's decay does not reckon with; "
        "use model.attention.value_residual=false",
    ),
    Rule(
        lambda m: m.stream == "skipless" and m.placement == "none" and m.activation != "tailored",
        ("model.stream", "model.placement", "model.activation"),
        "without skips and norms the signal shrinks with every activation whose variance is not 1; "
        "use model.activation=tailored, or model.placement=pre",
    ),
)


def problems(model: ModelConfig) -> list[tuple[str, tuple[str, ...]]]:
    """What is wrong with a model whose axes are filled: sentences, each with the keys to blame."""
    return [(f"{_shown(model, rule.keys)}: {rule.reason}", rule.keys) for rule in RULES if rule.broken(model)]


def _shown(model: ModelConfig, keys: tuple[str, ...]) -> str:
    return " with ".join(f"{key}={_value(model, key)}" for key in keys)


def _value(model: ModelConfig, key: str) -> object:
    found: object = model
    for part in key.split(".")[1:]:
        found = getattr(found, part)
    return found
