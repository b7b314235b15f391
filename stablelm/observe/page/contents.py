"""What the page of a run shows: tiles, charts, maps, events and tables, of its files and its records."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stablelm.observe.page.axes import Axis, label
from stablelm.observe.page.charts import Chart, Heatmap, Mark, chart, heatmap
from stablelm.observe.page.curves import Curve
from stablelm.observe.page.metrics_reader import COUNTED, Event, MetricsReader, first_layer
from stablelm.observe.page.run_files import RunFiles, RunState
from stablelm.observe.page.tables import (
    GIB,
    MOST_ROWS,
    Tile,
    attempt,
    cut,
    evaluations,
    events,
    figures,
    main_metrics,
    problems,
    samples,
    subtitle,
    tiles,
)
from stablelm.redaction import redacted

MOST_MARKS, MOST_EXTRA, TEXT_BYTES = 40, 60, 200_000
LOSS_LOG = 3.0
"""The loss has a logarithmic axis if it spreads by this factor."""

LAYERS: dict[str, tuple[str, str]] = {
    "layer/stream_rms": ("Stream RMS", "Root mean square of the residual stream after each layer; 0 is the embedding."),
    "layer/branch_rms": ("Branch RMS", "Root mean square of what a layer's branches add, before their scale."),
    "layer/grad_norm": ("Gradient to the stream", "Norm of the loss's gradient to the stream at each layer."),
    "layer/weight_grad_norm": ("Gradient to the weights", "Norm of the loss's gradient to a layer's matrices."),
    "layer/token_correlation": ("Token correlation", "Mean cosine between tokens of a sequence: near 1 all are alike."),
    "layer/kurtosis": ("Kurtosis of the stream", "1: all features alike; its width: one outlier has everything."),
    "layer/angular_distance": (
        "Change of the stream by a layer",
        "Angle between a layer's input and output over pi: near 0 the layer does little.",
    ),
    "attention/entropy": ("Attention entropy", "Mean over heads and rows, nats: near 0 each token sees one other."),
    "attention/logit_max": ("Largest attention logit", "Absolute value, as the softmax sees it."),
    "attention/sink_share": (
        "Attention to the first token",
        "Share of all attention: an attention sink takes most of it.",
    ),
}


@dataclass(frozen=True)
class Group:
    """A chart of all curves with one of `names` or a name that begins with one of `prefixes`."""

    title: str
    names: tuple[str, ...] = ()
    prefix: str = ""
    unit: str = ""
    scale: float = 1.0
    log_from: float = math.inf
    zero: bool = False

    def takes(self, name: str) -> bool:
        return name in self.names or bool(self.prefix and name.startswith(self.prefix))


GROUPS = (
    Group("Bits per byte", prefix="val_bits_per_byte/", unit="bits", log_from=LOSS_LOG),
    Group("Accuracy in tasks", prefix="task/", unit="share of items"),
    Group("Gradient norm", ("grad_norm",), log_from=10),
    Group("Learning rate", ("lr",), zero=True),
    Group("Throughput", ("tokens_per_second",), unit="tokens/s", zero=True),
    Group("Model FLOPs utilisation", ("mfu",), unit="share of the peak", zero=True),
    Group("Time of a step", ("step_seconds", "data_wait_seconds", "store_wait_seconds"), unit="s", zero=True),
    Group("Peak memory", ("memory_bytes",), unit="GiB of one rank", scale=GIB, zero=True),
    Group("Times through the data", prefix="data_epoch", unit="epochs", zero=True),
    Group("Variability of token embeddings", ("embedding/tev_mean", "embedding/tev_std")),
    Group("Loss by frequency of the token", prefix="val_loss_by_frequency/", unit="nats", log_from=LOSS_LOG),
    Group("Update relative to the weights", prefix="update_ratio/", log_from=10),
    Group("Sharpness", ("sharpness",), log_from=10, zero=True),
)
NOT_DRAWN = frozenset({"slowest_rank", "slowest_rank_seconds", "layers_seconds", *COUNTED, "rewinds"})


@dataclass(frozen=True)
class Contents:
    """All that the template is given."""

    name: str
    subtitle: str
    state: RunState
    marked: str
    """What the vertical lines of charts are, if there are any."""
    problems: list[str]
    tiles: list[Tile]
    loss: list[Chart]
    charts: list[Chart]
    more: list[Chart]
    unchanged: list[str]
    heatmaps: list[Heatmap]
    events: list[tuple[str, str]]
    figures: list[list[str]]
    evaluations: list[list[str]]
    samples: list[tuple[str, list[dict[str, str]]]]
    config_name: str
    config: str
    attempts: list[dict[str, str]]


def contents(files: RunFiles, reader: MetricsReader, *, running: bool) -> Contents:
    """`running`: whether the run itself makes the page."""
    curves = {name: curve for name, curve in reader.curves.items() if curve.points}
    x = _steps(curves)
    marks = _marks(reader.events)
    drawn = [name for name in curves if name not in NOT_DRAWN and not name.startswith(("loss", "val_loss/"))]
    others = [name for name in drawn if not any(group.takes(name) for group in GROUPS)]
    unchanged = [name for name in drawn if _is_unchanged(curves[name]) and (name in others or _is_zero(curves[name]))]
    charts = [_group(group, curves, x, marks) for group in GROUPS]
    more = [chart(cut(name), [(cut(name), curves[name].points)], x, log_from=50) for name in others]
    layers = sorted(reader.maps.items(), key=_order)
    maps = [heatmap(*_of_map(name), found, first_layer(name)) for name, found in layers]
    return Contents(
        name=cut(files.name),
        subtitle=subtitle(files),
        state=files.state(reader.attempt, running=running),
        marked="Dashed lines: attempts by number, and rewinds (⟲)." if marks else "",
        problems=[*files.problems, *problems(reader)],
        tiles=tiles(files, reader, curves),
        loss=_losses(files, curves, x, marks),
        charts=[found for found in charts if found],
        more=[found for name, found in zip(others, more, strict=True) if found and name not in unchanged][:MOST_EXTRA],
        unchanged=[f"{cut(name)} {label(curves[name].latest)}" for name in unchanged][:MOST_EXTRA],
        heatmaps=[found for found in maps if found],
        events=events(files, reader),
        figures=[figures(name, curves[name]) for name in main_metrics(curves)],
        evaluations=evaluations(curves),
        samples=samples(reader),
        config_name=files.config_name,
        config=redacted(cut(files.config_text, TEXT_BYTES)),
        attempts=[attempt(entry) for entry in files.attempts[-MOST_ROWS:]],
    )


def _steps(curves: Mapping[str, Curve]) -> Axis:
    ends = [step for curve in curves.values() for step in (curve.points[0].first, curve.points[-1].last)]
    low, high = min(ends, default=0), max(ends, default=1)
    return Axis(float(min(low, high - 1)) if low > high / 20 else 0.0, float(max(high, 1)))


def _marks(events: list[Event]) -> list[Mark]:
    """The newest ones of those that change what follows."""
    drawn = [event for event in events if event.kind in ("attempt", "rewind") and event.reached][-MOST_MARKS:]
    return [
        Mark(event.first, str(event.count), "resume", f"attempt {event.count} from step {event.first:,}")
        if event.kind == "attempt"
        else Mark(event.first, "⟲", "rewind", f"rewound before step {event.first:,}, from {event.reached:,}")
        for event in drawn
    ]


def _on(x: Axis, marks: list[Mark]) -> list[Mark]:
    return [Mark(x.share(mark.at), mark.label, mark.tone, mark.words) for mark in marks if x.low <= mark.at <= x.high]


def _losses(files: RunFiles, curves: Mapping[str, Curve], x: Axis, marks: list[Mark]) -> list[Chart]:
    """Over the whole run, and over its last half where that shows more."""
    names = [name for name in curves if name == "loss" or name.startswith("val_loss/")]
    found = [(_loss_name(name), curves[name].points) for name in names]
    unigram = files.summary.get("unigram_loss")
    value = next(iter(unigram.values()), None) if isinstance(unigram, dict) and len(unigram) == 1 else None
    level = ("unigram", float(value)) if isinstance(value, int | float) and 0 < value < 1e3 else None
    unit = "nats per token"
    whole = chart("Loss", found, x, unit=unit, log_from=LOSS_LOG, wide=True, marks=_on(x, marks), level=level)
    late = Axis((x.low + x.high) / 2, x.high)
    halves = [(name, [point for point in points if point.first >= late.low]) for name, points in found]
    half = chart("Loss, second half", halves, late, unit=unit, marks=_on(late, marks), means_only=True)
    longest = max((len(points) for _, points in halves), default=0)
    return [found for found in (whole, half if longest >= 50 else None) if found]


def _loss_name(name: str) -> str:
    return "training" if name == "loss" else cut("validation " + name.removeprefix("val_loss/"))


def _group(group: Group, curves: Mapping[str, Curve], x: Axis, marks: list[Mark]) -> Chart | None:
    names = [name for name in curves if group.takes(name) and not _is_zero(curves[name])]
    found = [(_short(name, group), curves[name].points) for name in names[:12]]
    options = {"unit": group.unit, "scale": group.scale, "log_from": group.log_from, "zero": group.zero}
    return chart(group.title, found, x, marks=_on(x, marks), **options)


def _short(name: str, group: Group) -> str:
    return cut(name.removeprefix(group.prefix).lstrip("/") or "all")


def _is_unchanged(curve: Curve) -> bool:
    low, high = curve.lowest(), curve.highest()
    return low is not None and high is not None and low.low == high.high


def _is_zero(curve: Curve) -> bool:
    return _is_unchanged(curve) and curve.latest == 0


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    names = list(LAYERS)
    return (names.index(item[0]) if item[0] in names else len(names), item[0])


def _of_map(name: str) -> tuple[str, str]:
    if name.startswith("sigma/"):
        return cut(f"Spectral norm, {name.removeprefix('sigma/')}"), "Of the matrices that are reparametrised."
    return LAYERS.get(name, (cut(name), ""))
