"""`probe --coordinates`: its shapes from the command line, its files, and whether it passes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm.config.load import load
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError
from stablelm.json_text import as_number
from stablelm.new_files import clear, replace_file
from stablelm.probe.prober import ProbeRequest, create, prepare, progress
from stablelm.process_exit import exit_code_of

if TYPE_CHECKING:
    from stablelm.probe.coordinates import SizeSeries

FORM = "depths=2,8,32,widths=64,128,256"
TITLES = {
    "stream": "stream",
    "stream_change": "change of the stream",
    "branches": "branches",
    "logits": "logits",
    "logits_change": "change of the logits",
}
STYLES = {"depth": "layers", "width": "d_model"}


@dataclass(frozen=True)
class Coordinates:
    """The sizes asked for, in order; one alone where only the other axis varies."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class CheckRequest:
    """The checked models of each axis, by size."""

    asked: Coordinates
    models: dict[str, dict[int, ProbeRequest]]

    @property
    def first(self) -> ProbeRequest:
        return next(iter(next(iter(self.models.values())).values()))


def parse(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(depths, widths) of `depths=2,8,widths=64,128`; () for what is left out. Raises ConfigError."""
    found: dict[str, list[int]] = {"depths": [], "widths": []}
    name = ""
    for item in text.split(","):
        key, given, value = item.strip().rpartition("=")
        name = key if given else name
        if name not in found or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--coordinates {text} is not of the form {FORM}; {item.strip()!r} is wrong")
        if int(value) in found[name]:
            raise ConfigError(f"--coordinates {text} names {value} twice in {name}; leave one out")
        found[name].append(int(value))
    if max(map(len, found.values())) < 2:
        raise ConfigError(f"--coordinates {text} has nothing to compare; give at least two depths or widths, as {FORM}")
    return tuple(found["depths"]), tuple(found["widths"])


def check(
    files: list[str], overrides: list[str], text: str, *, out: str | None, sequences: int, seq_len: int | None
) -> int:
    """Prints slopes and whether they pass, writes coordinates.json and coordinates.png; returns the exit code."""

    def request() -> CheckRequest:
        return requested(files, overrides, text, out=out, sequences=sequences, seq_len=seq_len)

    return exit_code_of(request, _run)


def requested(
    files: list[str], overrides: list[str], text: str, *, out: str | None, sequences: int, seq_len: int | None
) -> CheckRequest:
    """Every model of the check, resolved and checked. Raises ConfigError."""
    depths, widths = parse(text)
    base = load(files, overrides, world_size=1).config.model
    asked = Coordinates(depths or (base.n_layers,), widths or (base.d_model,))

    def model(depth: int, width: int) -> ProbeRequest:
        shape = _shape(base, depth, width)
        loaded = load(files, [*overrides, *(f"{name}={value}" for name, value in shape.items())], world_size=1)
        return prepare(loaded, out, sequences, seq_len)

    models: dict[str, dict[int, ProbeRequest]] = {}
    first_depth, first_width = asked.depths[0], asked.widths[0]
    if len(asked.depths) > 1:
        models["depth"] = {depth: model(depth, first_width) for depth in asked.depths}
    if len(asked.widths) > 1:
        models["width"] = {width: model(first_depth, width) for width in asked.widths}
    return CheckRequest(asked, models)


def _shape(base: ModelConfig, depth: int, width: int) -> dict[str, int]:
    """Keys of a depth and width: heads keep their features, so that their number grows with the width."""
    found = {"model.n_layers": depth, "model.d_model": width}
    for name in ("n_heads", "kv_heads", "d_ff"):
        value = getattr(base, name)
        if value is None or width == base.d_model:
            continue
        if value * width % base.d_model:
            step = base.d_model // math.gcd(value, base.d_model)
            raise ConfigError(
                f"--coordinates widths={width} gives no whole model.{name} in the ratio {value}/{base.d_model} of "
                f"model.d_model={base.d_model}; use multiples of {step}"
            )
        found[f"model.{name}"] = value * width // base.d_model
    return found


def _run(request: CheckRequest) -> None:
    from stablelm.probe.coordinates import STEPS, measure_line
    from stablelm.probe.disk_offload import unwritable
    from stablelm.train.job import first_rows

    first = request.first
    create(first.out)
    config = first.config
    print(
        f"{config.model.method}, coordinate check: {STEPS} steps at train.lr={config.train.lr:g} on "
        f"{first.sequences} x {first.seq_len} tokens of {config.data.path}",
        flush=True,
    )
    tokens, targets = first_rows(first.prepared, first.sequences, first.seq_len)
    fixed = {"depth": request.asked.widths[0], "width": request.asked.depths[0]}
    total = sum(len(models) for models in request.models.values()) * (STEPS + 1)
    with progress(total, "steps") as on_step:
        lines = [
            measure_line(
                axis, {size: one.config for size, one in models.items()}, fixed[axis], tokens, targets, on_step
            )
            for axis, models in request.models.items()
        ]
    for line in in_words(lines):
        print(line)
    try:
        text = json.dumps(as_json(config, lines), indent=1, allow_nan=False) + "\n"
        replace_file(first.out / "coordinates.json", text)
        clear(first.out / "coordinates.png")
        draw(config, lines, first.out / "coordinates.png")
    except OSError as error:
        raise unwritable(first.out, error) from error
    print(f"written: {first.out}/coordinates.json, {first.out}/coordinates.png")


def in_words(lines: "Sequence[SizeSeries]") -> list[str]:
    """A line of slopes for each axis, and the verdict."""
    from stablelm.probe.coordinates import LIMIT

    said = []
    for line in lines:
        slopes = ", ".join(f"{TITLES[name]} {slope:+.2f}" for name, slope in line.slopes().items())
        sizes = ", ".join(map(str, line.sizes))
        said.append(f"slope in {line.axis} ({sizes} {STYLES[line.axis]}): {slopes}")
    growing = [f"{TITLES[name]} with {line.axis}" for line in lines for name in line.growing()]
    if not growing:
        return [*said, f"passed: after the last step no size grows with a slope above {LIMIT}"]
    return [*said, f"failed: {', '.join(growing)} grow with a slope above {LIMIT}"]


def as_json(config: Config, lines: "Sequence[SizeSeries]") -> dict[str, Any]:
    """What `coordinates.json` holds; `figures`: root mean squares by step from 0, for each size."""
    from stablelm.probe.coordinates import FIGURES, LIMIT

    axes = {
        line.axis: {
            "sizes": list(line.sizes),
            "fixed": line.fixed,
            "slopes": as_number(line.slopes()),
            "growing": line.growing(),
            "figures": {
                name: [[as_number(float(value)) for value in row] for row in line.figures[:, :, index]]
                for index, name in enumerate(FIGURES)
            },
        }
        for line in lines
    }
    return {
        "method": config.model.method,
        "lr": config.train.lr,
        "limit": LIMIT,
        "passed": not any(line.growing() for line in lines),
        "axes": axes,
    }


def draw(config: Config, lines: "Sequence[SizeSeries]", path: Path) -> None:
    """A row of panels for each axis: size of the model across, a curve for each step from light to dark."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    from stablelm.probe.coordinates import FIGURES
    from stablelm.probe.probe_report import tick

    figure = Figure(figsize=(3 * len(FIGURES), 2.9 * len(lines) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{config.model.method}: root mean squares after 0 to 10 steps at rate {config.train.lr:g}")
    panels = figure.subplots(len(lines), len(FIGURES), squeeze=False)
    for row, line in zip(panels, lines, strict=True):
        slopes, steps = line.slopes(), line.figures.shape[1]
        for index, (panel, name) in enumerate(zip(row, FIGURES, strict=True)):
            for step in range(steps):
                values = line.figures[:, step, index]
                if (values > 0).all():
                    colour = colormaps["viridis_r"]((step + 1) / (steps + 1))
                    panel.plot(line.sizes, values, "o-", color=colour, markersize=3, linewidth=1.2)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(line.sizes, [str(size) for size in line.sizes])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            panel.yaxis.set_major_formatter(FuncFormatter(tick))
            panel.minorticks_off()
            verdict = "" if name not in line.growing() else ", grows"
            panel.set_title(f"{TITLES[name]} ({slopes[name]:+.2f}{verdict})", loc="left", fontsize=9)
            panel.set_xlabel(STYLES[line.axis], fontsize=9)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
