"""U-SPA: a stack without skips, by attention that gives all pairs of tokens one correlation (He et al., ICLR 2023).

The attention of layer l is the matrix chol((1 - r) I + r 11^T) chol((1 - r') I + r' 11^T)^-1, with r' the correlation
that it finds and r the one that it leaves. Feed-forwards map such a kernel to another, so the plan holds exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stablelm.methods.axes import Array, Method, Model, Refusal
from stablelm.methods.e_spa import DEFAULTS, HE, EspaOptions, Planned, setting
from stablelm.theory.faithful_attention import uniform_plan, uniform_rows


@dataclass(frozen=True)
class Uspa(Planned):
    name: ClassVar[str] = "uspa"

    def rows(self, model: Model, layer: int, places: NDArray[np.int64], length: int) -> tuple[Array, Array]:
        before, after = uniform_plan(setting(model), model.option(EspaOptions).uniform)[layer]
        rows = uniform_rows(before, after, places, length)
        sums = rows.sum(axis=1)
        with np.errstate(divide="ignore"):
            return np.log(rows / sums[:, None]), sums

    def out_of_reach(self, model: Model) -> Iterable[Refusal]:
        last = model.option(EspaOptions).uniform
        if not uniform_plan(setting(model), last):
            yield Refusal(
                ("model.attention.shaping", "model.e_spa.uniform", "model.activation"),
                "the feed-forwards alone give different tokens a higher correlation than the one planned; "
                "use model.activation=tailored with a lower model.e_spa.nonlinearity, or a higher model.e_spa.uniform",
            )

    def modelling(self, model: Model) -> dict[str, Any]:
        return {"attention_correlations": uniform_plan(setting(model), model.option(EspaOptions).uniform)}


U_SPA = Method("u_spa", HE, {**DEFAULTS, "attention.shaping": "uspa"}, (Uspa(),))
