"""Parity of a model with an independent implementation of its equations, in float64."""

from collections.abc import Callable, Mapping

from torch import Tensor

# Norms of gradients relative to the largest: what takes part, and the least that errors are relative to.
PART, LEAST = 1e-8, 1e-6
FORWARD, BACKWARD = 1e-12, 1e-9  # bounds of the errors


def assert_parity(
    record: Callable[[str, object], None],
    method: str,
    outputs: tuple[Tensor, Tensor],
    gradients: Mapping[str, tuple[Tensor | None, Tensor | None]],
    *,
    idle: tuple[str, ...] = (),
) -> None:
    """Ours and theirs: a loss or hidden states, and the gradient of each parameter, which takes part unless `idle`.

    Errors are relative norms. `record`: pytest's `record_property`, from whose report docs/make_method_tables.py makes
    a table.
    """
    found, wanted = outputs
    ahead = ((found - wanted).norm() / wanted.norm()).item()
    norms = {name: theirs.norm().item() for name, (_, theirs) in gradients.items() if theirs is not None}
    largest = max(norms.values())
    back = {}
    for name, (ours, theirs) in gradients.items():
        assert ours is not None and theirs is not None, name
        assert norms[name] > PART * largest or name in idle, f"{name} takes no part"
        back[name] = (ours - theirs).norm().item() / max(norms[name], LEAST * largest)
    worst = max(back, key=lambda name: back[name])
    assert ahead <= FORWARD, ahead
    assert back[worst] <= BACKWARD, (worst, back[worst])
    record("parity", f"{method} {ahead:.2g} {back[worst]:.2g}")
