"""A loss and metrics of a user's own, named as `support.own_hooks:NAME`, and some that are wrong."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.observe.own_metrics import StepView

SMOOTHING, FOCUS = 0.1, 2.0


def label_smoothing(logits: Tensor, targets: Tensor) -> Tensor:
    """Szegedy et al. 2016, section 7."""
    return F.cross_entropy(logits, targets, label_smoothing=SMOOTHING, reduction="none")


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Lin et al. 2017, equation 4."""
    log_p = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    return -((1 - log_p.exp()) ** FOCUS) * log_p


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def mean(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def as_list(logits: Tensor, targets: Tensor) -> list:
    return plain(logits, targets).tolist()


def as_integers(logits: Tensor, targets: Tensor) -> Tensor:
    return targets


def detached(logits: Tensor, targets: Tensor) -> Tensor:
    return plain(logits.detach(), targets)


def infinite(logits: Tensor, targets: Tensor) -> Tensor:
    return plain(logits, targets) / 0


def overflows_later(logits: Tensor, targets: Tensor) -> Tensor:
    """Finite for the few tokens of the call before a run."""
    return plain(logits, targets) * (1.0 if len(targets) <= 4 else float("inf"))


def of_the_batch(logits: Tensor, targets: Tensor) -> Tensor:
    losses = plain(logits, targets)
    return losses * losses.detach() / losses.detach().mean()


def fails(logits: Tensor, targets: Tensor) -> Tensor:
    raise ValueError("no such class")


def in_place(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.exp_().sum(dim=-1)


def alone(logits: Tensor) -> Tensor:
    return logits.sum(dim=-1)


NUMBER = 3


def norms(view: StepView) -> dict[str, float]:
    """Norms of weights, gradients and moments of each matrix kind, and draws of the generators."""
    torch.rand(3)
    random.random()
    squares = {
        f"{kind}/{name}": part.double().square().sum()
        for kind in ("weight", "gradient", "exp_avg", "exp_avg_sq")
        for name, part in view.parts(kind).items()
        if name in ("embedding.weight", "norm_final.weight", "layers.1.feedforward.body.fc1.weight")
    }
    return {name: square**0.5 for name, square in view.sums(squares).items()}


def place(view: StepView) -> dict[str, float]:
    return {"step": view.step, "tokens": view.tokens, "layers": len(view.model.layers), "nan": float("nan")}  # type: ignore[arg-type]


def place_again(view: StepView) -> dict[str, float]:
    return {"step": view.step}


def broken(view: StepView) -> dict[str, float]:
    return {"norm": view.parts()["no such parameter"]}  # type: ignore[dict-item]


def nothing(view: StepView) -> None:
    return None


def vector(view: StepView) -> dict:
    return {"gradient": torch.zeros(3)}


def strange_name(view: StepView) -> dict:
    return {"a b": 1.0}
