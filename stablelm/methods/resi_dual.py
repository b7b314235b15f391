"""ResiDual: a Post-LN stream, and beside it the plain sum of its branches (Xie et al. 2023, arXiv 2304.14802)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stablelm.methods.axes import Method, Model, Placement, Refusal, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class Dual(Stream):
    """(x, d): both start as the embeddings, x <- x + f(x) with the norm after it, d <- d + f(x); the end is
    x + norm(d) (released code; section 3)."""

    name: ClassVar[str] = "dual"
    dual: ClassVar[bool] = True
    normed: ClassVar[int | None] = 1

    def start(self, embedded: "Tensor") -> "Chunks":
        # Two tensors, or the first layer would be compiled for one that comes twice.
        return (embedded, embedded.view_as(embedded))

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        branch = branch.to(chunks[0].dtype)
        return tuple(chunk + branch for chunk in chunks)

    def end(self, chunks: "Chunks", norm: "Callable[[Tensor], Tensor] | None") -> "Tensor":
        x, total = chunks
        return x + (total if norm is None else norm(total))

    def refusals(self, model: Model) -> Iterable[Refusal]:
        placement = model.axes.placement
        if not (placement.final and all(at.after_write for at in placement.used())):
            yield Refusal(
                ("model.stream", "model.placement"),
                "the two streams are one without norms on the first of them, and the end is its sum with a norm of the "
                "second; use model.placement=post_final, or model.stream=residual",
            )

    def export_obstacle(self, model: Model) -> str:
        return "its stream is two tensors, which no standard architecture has"

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"dual_stream": True}


RESI_DUAL = Method(
    "resi_dual",
    "Xie et al., ResiDual: Transformer with Dual Residual Connections, 2023",
    # Embeddings of variance 1, as the released code has them.
    {"stream": "dual", "placement": "post_final", "init": "fan_in"},
    (Dual(), Placement("post_final", after_write=True, final=True)),
)
