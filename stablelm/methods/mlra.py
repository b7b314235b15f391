"""MLRA: query, key and value maps of two factors, which spreads the embeddings (Chung et al., EMNLP 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import Maps, Method, Model


@dataclass(frozen=True)
class LowRank(Maps):
    name: ClassVar[str] = "low_rank"

    def asked(self, model: Model) -> bool:
        return bool(model.attention.low_rank)

    def rank(self, model: Model) -> int:
        return max(1, round((model.attention.low_rank or 0) * model.d_model))


MLRA = Method(
    "mlra",
    "Chung et al., Stable Language Model Pre-training by Reducing Embedding Variability, EMNLP 2024",
    {"attention.low_rank": 0.5, "init": "gpt2"},
    (LowRank(),),
)
