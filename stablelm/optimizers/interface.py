"""What an optimizer must answer: its state, its update of a range of elements, and what it needs besides.

An optimizer knows nothing of ranks. The engine cuts tensors as it holds them (rows, flat shards) and joins small ones
into one flat tensor, so that an update is written once, on plain 1-dim tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from stablelm.methods.roles import Refusal

if TYPE_CHECKING:
    from torch import Tensor


class StateTensor(NamedTuple):
    """A tensor of state of a parameter: one value an element, or a single one; zeros at first, or the weights."""

    single: bool = False
    from_weights: bool = False


@dataclass
class Elements:
    """Elements of one or several parameters of a group, joined: what `Update.update` changes in place.

    weight, gradient (clipped), state of an element each: (n,) in the parameters' dtype. step and single values of
    state: (k,), one a parameter; `step` is the number of this update, from 1. mean: (k,), of `Update.statistic` over
    the whole parameter. curvature: (n,) where this step has estimated it, else None.
    """

    weight: "Tensor"
    gradient: "Tensor"
    state: "dict[str, Tensor]"
    step: "Tensor"
    lr: float
    decay: float
    eps: float
    betas: tuple[float, float]
    hidden: bool
    """Whether these are matrices of the layers."""
    each: "Callable[[Tensor], Tensor]"
    """Values (k,) of parameters for each of their elements; broadcasts to (n,)."""
    mean: "Tensor | None" = None
    curvature: "Tensor | None" = None


@dataclass(frozen=True)
class Update:
    """The rule of an optimizer; the defaults are those of one that treats every element by itself, as Adam does."""

    name: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    zero_obstacle: ClassVar[str] = ""
    """Why DeepSpeed's flat shards will not do; empty: they do."""
    backward_obstacle: ClassVar[str] = "needs all gradients at once"
    """Why parameters cannot be updated one by one in the backward pass; empty: they can."""
    rounds: ClassVar[bool] = True
    """Whether its state may be stored in bf16 (`train.moments`)."""

    def states(self, *, hidden: bool) -> dict[str, StateTensor]:
        """The state of a parameter by name; `hidden`: whether it is a matrix of the layers. A count is kept beside."""
        raise NotImplementedError

    def update(self, piece: Elements) -> None:
        """One update of the elements of `piece` and of their state, in place."""
        raise NotImplementedError

    def statistic(self, piece: Elements) -> "Tensor | None":
        """(n,): what the update needs the mean of over each whole parameter, of the state before it; None: nothing."""
        return None

    def whole(self, *, hidden: bool) -> "WholeMatrices | None":
        """Of parameters whose update needs whole matrices: how; `update` is not called for them."""
        return None

    def passes(self, step: int) -> tuple[str, ...]:
        """The passes over the batch of an optimizer step, from 1: `PASSES` below; the last one's gradient updates."""
        return ("gradient",)

    def extra_passes(self) -> float:
        """Passes over the batch beyond the first, a step on average."""
        return 0.0

    def copies(self) -> int:
        """Tensors of the parameters' size that are held during the passes besides gradients and state."""
        return 0

    def evaluated(self, weight: "Tensor", state: "dict[str, Tensor]") -> "Tensor | None":
        """The weights to evaluate and export, from those of the gradient passes; None: the same ones.

        `state`: of `evaluation_state`, in any layout, equal for both.
        """
        return None

    def evaluation_state(self) -> tuple[str, ...]:
        """The state that `evaluated` needs."""
        return ()

    def refusals(self, config: Any) -> Iterator[Refusal]:
        """What keys contradict it, in the form of a method's refusals; `config`: a `config.schema.Config`."""
        return iter(())


GRADIENT, ASCENDED, CURVATURE = "gradient", "ascended", "curvature"
PASSES = (GRADIENT, ASCENDED, CURVATURE)
"""At the weights; at weights moved against the descent (SAM); of targets drawn from the model (Sophia)."""


@dataclass(frozen=True)
class WholeMatrices:
    """An update of a whole matrix: its state's step, its direction, and what the direction does to the weights.

    `momentum(gradient, state) -> (new state, input)` and `applied(weight, direction, lr, decay, shape)` take a
    rank's rows; `direction(input)` takes the whole matrix, on the rank that owns it.
    """

    state: str
    momentum: "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"
    direction: "Callable[[Tensor], Tensor]"
    applied: "Callable[[Tensor, Tensor, float, float, tuple[int, int]], Tensor]"
    flops: Callable[[tuple[int, int]], float] = field(default=lambda shape: 0.0)
    """Of `direction`, of a matrix of that shape."""
