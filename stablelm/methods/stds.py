"""The std of a parameter's initial values, by its role."""

from collections.abc import Sequence

from stablelm.methods.axes import Model, Role
from stablelm.methods.sizes import d_key_value, widths


def initial_std(role: Role, shape: Sequence[int], model: Model) -> float:
    """The std of a matrix's or table's initial values under `model.init`; `shape` is (fan_out, fan_in).

    A shared layer has that of its first place.
    """
    init = model.axes.init
    if role.layer is not None:
        role = role._replace(layer=model.axes.stack.first_place(model, role.layer))
    if role.kind in ("embedding", "position"):
        return init.embedding_std(model)
    if role.kind == "head":
        return init.head_std(model)
    if role.kind in ("projection", "head_gate"):
        return shape[1] ** -0.5
    return init.std(role, shape, model) if role.factor is None else _factor_std(role, shape, model)


def _factor_std(role: Role, shape: Sequence[int], model: Model) -> float:
    """The std of both factors that gives their product the std s of the whole map: (s^2 / rank)^(1/4) (ours)."""
    assert role.layer is not None
    width = widths(model, 2 * role.layer)
    whole = (width.attention if role.kind == "query" else d_key_value(model), width.read)
    inner = shape[0] if role.factor == "down" else shape[1]
    return (model.axes.init.std(Role(role.kind, role.layer), whole, model) ** 2 / inner) ** 0.25


def map_variance(model: Model, kind: str, sublayer: int, d_in: int, d_out: int) -> float:
    """Variance of the entries of a map as it acts at the start: of low-rank factors, of a reparametrised matrix."""
    if model.axes.init.starts_at_zero(kind):
        return 0.0
    layer = model.axes.stack.layer_at(model, sublayer // 2)
    inner = model.axes.maps.rank(model) if kind in ("query", "key", "value") else None
    if inner is None:
        return entry_variance(model, Role(kind, layer), (d_out, d_in), sublayer)
    down = entry_variance(model, Role(kind, layer, "down"), (inner, d_in), sublayer)
    return down * entry_variance(model, Role(kind, layer, "up"), (d_out, inner), sublayer) * inner


def entry_variance(model: Model, role: Role, shape: tuple[int, int], sublayer: int) -> float:
    """Of the entries of one matrix (fan_out, fan_in), of a reparametrised one as it acts."""
    std, reparam = initial_std(role, shape, model) * model.axes.gains.start(model, role.kind), model.axes.reparam
    return reparam.entry_variance(model, std, shape) if reparam.applies(model, sublayer) else std**2
