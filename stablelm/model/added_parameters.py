"""Parameters that axis values add to a module."""

import torch
from torch import Tensor, nn

from stablelm.methods.axes import Added
from stablelm.model.linear import Dtypes


def add_parameters(module: nn.Module, parameters: tuple[Added, ...], dtypes: Dtypes) -> tuple[str, ...]:
    """Registers the parameters that an axis value adds to a module, uninitialised, and returns their names."""
    for parameter in parameters:
        empty = torch.empty(parameter.start.shape, dtype=dtypes.parameter)
        module.register_parameter(parameter.name, nn.Parameter(empty))
    return tuple(parameter.name for parameter in parameters)


def named_parameters_of(
    module: nn.Module, names: tuple[str, ...], compute_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """These parameters of a module, by name; matrices in the compute dtype, in which engines may gather them."""
    found = {name: getattr(module, name) for name in names}
    if compute_dtype is None:
        return found
    return {name: value.to(compute_dtype) if value.ndim > 1 else value for name, value in found.items()}
