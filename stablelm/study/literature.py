"""Learning rates that papers trained a method at, for sizes without a recorded study."""

from dataclasses import dataclass

from stablelm.study.advise import NEAR, Question

MAGNETO = (
    "Wang et al. 2022, arXiv 2210.06423, causal language models of 1,024 features (500,000 steps of 24 layers, 250,000 "
    "of 48 and 72)"
)


@dataclass(frozen=True)
class Published:
    """Models of a paper; `diverged`: a rate and a depth at which it did, None where it names none."""

    method: str
    depths: tuple[int, ...]
    d_model: int
    rate: float
    diverged: tuple[float, int] | None
    source: str

    def near(self, question: Question) -> bool:
        """Whether depth and width lie within the factor that records must; papers' texts differ too much for tokens."""
        depth = min(max(question.n_layers / each, each / question.n_layers) for each in self.depths)
        width = max(question.d_model / self.d_model, self.d_model / question.d_model)
        return self.method == question.method and max(depth, width) <= NEAR


PUBLISHED = (
    Published("pre_ln", (24, 48, 72), 1024, 5e-4, (1e-3, 24), MAGNETO),
    Published("normformer", (24, 48, 72), 1024, 5e-4, (1e-3, 24), MAGNETO),
    Published("magneto", (24,), 1024, 1e-3, None, MAGNETO),
    Published("magneto", (48, 72), 1024, 1.2e-3, None, MAGNETO),
)


def published(question: Question) -> Published | None:
    """The nearest in depth of those that are near."""
    found = [each for each in PUBLISHED if each.near(question)]
    return min(found, key=lambda each: min(abs(depth - question.n_layers) for depth in each.depths), default=None)
