"""GPT-2: Pre-LN with constant stds, biases, learned positions and a tied head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stablelm.methods.axes import Init, Method, Model, Role


@dataclass(frozen=True)
class Gpt2Init(Init):
    name: ClassVar[str] = "gpt2"

    def std(self, role: Role, shape: Sequence[int], model: Model) -> float:
        """0.02, output projections 0.02 / sqrt(2 n_layers): Radford et al. 2019, with nanoGPT's reading of it."""
        if role.kind in ("output", "fc2"):
            return 0.02 / math.sqrt(2 * model.n_layers)
        return 0.02

    def embedding_std(self, model: Model) -> float:
        return 0.02

    def head_std(self, model: Model) -> float:
        return 0.02


GPT2 = Method(
    "gpt2",
    "Radford et al., Language Models are Unsupervised Multitask Learners, OpenAI 2019",
    {"init": "gpt2", "bias": True, "tie_embeddings": True, "attention.position": "learned"},
    (Gpt2Init(),),
)
