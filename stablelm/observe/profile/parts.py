"""Names the parts of a step in a trace, only while one is taken: calls of the model, the optimizer and the loader."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

from torch.profiler import record_function

from stablelm.engine.interface import Engine
from stablelm.model.decoder import Decoder
from stablelm.model.norms import Norm
from stablelm.model.sublayer import Layer

MARK = "part: "
STEP = "step"
"""A whole step, from the end of the one before."""
BETWEEN = "records, evaluation, saving"
WAIT, EMBEDDING, ATTENTION, FEEDFORWARD = "data wait", "embedding", "attention", "feed-forward"
NORMS, HEAD, OPTIMIZER, COMMUNICATION = "norms", "head and loss", "optimizer", "communication"
COMPILED, OTHER, IDLE = "compiled layers", "other", "GPU idle"
ORDER = (
    *(WAIT, EMBEDDING, ATTENTION, FEEDFORWARD, NORMS, COMPILED, HEAD, OPTIMIZER, COMMUNICATION, IDLE),
    *(OTHER, BETWEEN),
)
"""In which the table lists them."""


class Call(NamedTuple):
    """A method that belongs to a part."""

    owner: Any
    method: str
    part: str


def calls(engine: Engine, loader: Any, *, compiled: bool) -> list[Call]:
    """The calls that make up a step. In compiled layers there are none: the graph is one call."""
    decoder = engine.module
    assert isinstance(decoder, Decoder)
    found = [
        Call(loader, "next", WAIT),
        Call(decoder, "embed", EMBEDDING),
        Call(decoder, "finish", HEAD),
        Call(decoder, "sums", HEAD),
        Call(engine, "step", OPTIMIZER),
    ]
    layers = [] if compiled else [part for part in decoder.modules() if isinstance(part, Layer)]
    for layer in layers:
        for sublayer, part in ((layer.attention, ATTENTION), (layer.feedforward, FEEDFORWARD)):
            found += [Call(sublayer, "enter", part), Call(sublayer, "leave", part)]
        found += [Call(part, "forward", NORMS) for part in layer.modules() if isinstance(part, Norm)]
    if decoder.norm_final is not None:
        found.append(Call(decoder.norm_final, "forward", NORMS))
    return found


@contextmanager
def marked(found: list[Call]) -> Iterator[None]:
    """Each call appears in the trace under its part's name; afterwards everything is as it was."""
    before = [vars(call.owner).get(call.method) for call in found]
    for call in found:
        setattr(call.owner, call.method, _within(call.part, getattr(call.owner, call.method)))
    try:
        yield
    finally:
        for call, own in zip(found, before, strict=True):
            # What the class defines shows again once the instance's own is gone.
            delattr(call.owner, call.method) if own is None else setattr(call.owner, call.method, own)


def _within(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def named(*arguments: Any, **options: Any) -> Any:
        with record_function(MARK + part):
            return call(*arguments, **options)

    return named
