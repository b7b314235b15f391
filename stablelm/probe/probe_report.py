"""How a probe is shown: a table on the console, `probe.json` and `probe.png`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stablelm.json_text import as_number
from stablelm.probe.measure import Measured
from stablelm.probe.predict import Prediction
from stablelm.probe.verdict import Evidence, Verdict

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 20
POINTS = 60
FIGURES = (
    "stream_variance",
    "branch_variance",
    "token_correlation",
    "attention_entropy",
    "gradient_norm",
    "weight_gradient_norm",
    "attention_branch_variance",
    "feedforward_branch_variance",
    "logit_max",
    "attention_sink",
    "kurtosis",
    "angular_distance",
)
HEADINGS = {
    "stream_variance": "stream\nvariance",
    "branch_variance": "branch\nvariance",
    "token_correlation": "token\ncosine",
    "attention_entropy": "attention\nentropy",
    "gradient_norm": "gradient\nnorm",
    "weight_gradient_norm": "weights'\ngradient",
}
PREDICTED = tuple(HEADINGS)[:5]
PANELS: tuple[tuple[str, Sequence[str]], ...] = (
    ("variance of the stream", ("stream_variance",)),
    ("variance of the branches", ("attention_branch_variance", "feedforward_branch_variance")),
    ("cosine of two tokens (1: rank collapse)", ("token_correlation",)),
    ("entropy of attention, nats", ("attention_entropy",)),
    ("gradient to the stream, norm", ("gradient_norm",)),
    ("gradient to a layer's matrices, norm", ("weight_gradient_norm",)),
)
NAMES = {"attention_branch_variance": "attention", "feedforward_branch_variance": "feed-forward"}
# Okabe and Ito's colours, distinguishable with any colour vision; the markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "^"))


@dataclass(frozen=True)
class Probe:
    """A measured model beside its prediction; `tokens` are those that the loss averages.

    `unpredicted`: why figures of the prediction are missing, by name. `sensitivity`: predicted, or None and the reason.
    """

    method: str
    n_layers: int
    d_model: int
    seq_len: int
    tokens: int
    collision: float
    measured: Measured
    prediction: Prediction
    unpredicted: dict[str, str]
    sensitivity: tuple[float | None, str | None]
    verdict: Verdict
    seconds: float

    def predicted(self, name: str) -> np.ndarray:
        """A column of the prediction by the measured one's name; nan where the theory has none."""
        if name == "branch_variance":
            return (self.prediction.attention_branch_variance + self.prediction.feedforward_branch_variance) / 2
        return getattr(self.prediction, name, np.full(self.n_layers + 1, np.nan))

    def found(self, name: str) -> np.ndarray:
        """A measured column."""
        return getattr(self.measured.internals, name)


def as_json(probe: Probe) -> dict[str, Any]:
    """What `probe.json` holds; entry 0 of `layers` is the embedding, a predicted null means no prediction.

    `attention_branch_spread`: by layer, the relative standard deviation of its variance between draws of the weights.
    Measured figures that are no numbers are written as the strings "nan", "inf" and "-inf", as in metrics.jsonl.
    """
    sigma = probe.measured.sigma.values()
    layers = [
        {
            name: {
                "predicted": _finite(probe.predicted(name)[index]),
                "measured": as_number(float(probe.found(name)[index])),
            }
            for name in FIGURES
        }
        for index in range(probe.n_layers + 1)
    ]
    return {
        "method": probe.method,
        "n_layers": probe.n_layers,
        "d_model": probe.d_model,
        "seq_len": probe.seq_len,
        "tokens": probe.tokens,
        "token_collision": probe.collision,
        "loss": as_number(probe.measured.loss),
        "tev": {"mean": probe.measured.tev[0], "std": probe.measured.tev[1]},
        "sigma": {"smallest": min(sigma), "largest": max(sigma)} if sigma else None,
        "seconds": round(probe.seconds, 2),
        "attention_branch_spread": [_finite(each) for each in probe.prediction.attention_branch_spread[1:]],
        "verdict": probe.verdict.text,
        "evidence": [_evidence(each) for each in probe.verdict.evidence],
        "sensitivity": {
            "predicted": probe.sensitivity[0],
            "measured": as_number(probe.measured.sensitivity),
            "reason": probe.sensitivity[1],
        },
        "unpredicted": probe.unpredicted,
        "first_steps": None if probe.measured.growth is None else as_number(asdict(probe.measured.growth)),
        "layers": layers,
    }


def reasons(probe: Probe) -> list[str]:
    """A sentence for each reason why figures have no prediction at some layer."""
    missing, found = probe.unpredicted, []
    for reason in dict.fromkeys(missing.values()):
        names = [name.replace("_", " ") for name in missing if missing[name] == reason]
        what = "all figures" if len(names) == len(vars(probe.prediction)) else ", ".join(names)
        found.append(f"No prediction of {what}: {reason}.")
    return found


def _evidence(found: Evidence) -> dict[str, Any]:
    """One signal of the verdict; `trained` and `failed`: (smallest, largest, how many) of the recorded ones."""
    sides = {"trained": found.trained, "failed": found.failed}
    return {
        "signal": found.name,
        "value": as_number(found.value),
        "status": found.status,
        "counted": found.unit,
        **{name: side and dict(zip(("low", "high", "count"), side, strict=True)) for name, side in sides.items()},
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def table(probe: Probe) -> "Table":
    """At most `ROWS` rows, evenly spread over depth, predicted beside measured."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.add_column("layer", justify="right")
    for name, words in HEADINGS.items():
        if name in PREDICTED:
            shown.add_column(f"{words}\npredicted", justify="right", style="dim")
        shown.add_column(f"{words}\nmeasured", justify="right")
    for index in chosen(probe.n_layers, ROWS):
        cells = []
        for name in HEADINGS:
            if name in PREDICTED:
                cells.append(_cell(probe.predicted(name)[index]).replace("nan", "-"))
            cells.append(_cell(probe.found(name)[index]))
        shown.add_row(str(index), *cells)
    return shown


def chosen(n_layers: int, most: int) -> list[int]:
    """At most `most` indices: 0, 1, n_layers and equal steps between."""
    step = -(-n_layers // (most - 2))
    return sorted({0, 1, *range(0, n_layers, step), n_layers})


def _cell(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def draw(probe: Probe, path: Path) -> None:
    """Small multiples over depth: predictions as lines, measurements as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{probe.method}, {probe.n_layers} layers x {probe.d_model}, at initialisation"
    figure.suptitle(f"{title} ({probe.tokens} tokens in sequences of {probe.seq_len})", fontsize=12)
    for place, (panel, (words, names)) in enumerate(zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True)):
        _panel(panel, probe, names)
        panel.set_title(words, loc="left", fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if place >= 3:
            panel.set_xlabel("layer (0: embedding)", fontsize=9)
    line = Line2D([], [], color="0.35", linewidth=1.6, label="predicted")
    points = Line2D([], [], color="0.35", marker="o", markerfacecolor="white", linestyle="", label="measured")
    figure.legend(handles=[line, points], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(panel: Any, probe: Probe, names: Sequence[str]) -> None:
    values = []
    for name, (colour, marker) in zip(names, STYLES, strict=False):
        # An embedding has no branches and no attention.
        first = 1 if name.endswith("branch_variance") or name == "attention_entropy" else 0
        depth = np.arange(first, probe.n_layers + 1)
        predicted, measured = probe.predicted(name)[first:], probe.found(name)
        points = [place for place in chosen(probe.n_layers, POINTS) if place >= first]
        panel.plot(depth, predicted, color=colour, linewidth=1.6)
        if name == "attention_branch_variance":
            spread = np.exp(2 * probe.prediction.attention_branch_spread[first:])
            panel.fill_between(depth, predicted / spread, predicted * spread, color=colour, alpha=0.15, linewidth=0)
        panel.plot(points, measured[points], marker, color=colour, markersize=4.5, markerfacecolor="white")
        panel.plot([], [], f"{marker}-", color=colour, markerfacecolor="white", label=NAMES.get(name))
        values += [predicted[np.isfinite(predicted)], measured[first:][np.isfinite(measured[first:])]]
    if len(names) > 1:
        panel.legend(frameon=False, fontsize=8)
    _scale(panel, np.concatenate(values), names[0])
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _scale(panel: Any, values: np.ndarray, name: str) -> None:
    """Logarithmic for gradients and for variances that span more than a factor of ten; no view magnifies noise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    wide = "gradient" in name or ("variance" in name and high > 10 * low)
    if not wide or low <= 0:
        panel.set_ylim(min(0.0, 1.1 * low), max(1.1 * high, 1.0 if name == "token_correlation" else 1e-12))
        return
    panel.set_yscale("log")
    centre, reach = math.sqrt(low * high), max(1.3 * math.sqrt(high / low), 4)
    panel.set_ylim(centre / reach, centre * reach)
    digits = (1, 2, 5) if reach < 30 else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=digits, numticks=8))
    panel.yaxis.set_major_formatter(FuncFormatter(tick))
    panel.yaxis.set_minor_formatter(NullFormatter())


def tick(value: float, _: Any) -> str:
    """A label of a logarithmic axis."""
    return f"{value:g}" if 1e-3 < value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
