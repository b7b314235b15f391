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
    if role.kind == "projection":
        return shape[1] ** -0.5
    return init.std(role, shape, model) if role.factor is None else _factor_std(role, shape, model)


def _factor_std(role: Role, shape: Sequence[int], model: Model) -> float:
    """The std of both factors that gives their product the std s of the whole map: (s^2 / rank)^(1/4) (ours)."""
    assert role.layer is not None
    width = widths(model, 2 * role.layer)
    whole = (width.attention if role.kind == "query" else d_key_value(model), width.read)
    inner = shape[0] if role.factor == "down" else shape[1]
    return (model.axes.init.std(Role(role.kind, role.layer), whole, model) ** 2 / inner) ** 0.25
