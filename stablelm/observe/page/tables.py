"""What a page says in words and tables: tiles, events, figures, samples, attempts."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stablelm.observe.console import short_number, short_time
from stablelm.observe.page.axes import figure
from stablelm.observe.page.curves import Curve
from stablelm.observe.page.metrics_reader import Event, MetricsReader
from stablelm.observe.page.run_files import RunFiles
from stablelm.redaction import redacted

LABEL = 80
"""Characters of a name or of a cell."""
MOST_ROWS, SAMPLE_CHARACTERS, MOST_SAMPLES = 60, 4_000, 16
GIB = 1 / 2**30


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


def cut(words: str, most: int = LABEL) -> str:
    """At most so many characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def subtitle(files: RunFiles) -> str:
    layers, width, params = files.key("model.n_layers"), files.key("model.d_model"), files.figure("params")
    parts = [
        str(files.key("model.method") or ""),
        f"{layers} layers × {width}" if layers and width else "",
        f"{short_number(params)} parameters" if params else "",
        str(files.key("train.precision") or ""),
    ]
    if files.key("engine.kind") not in (None, "auto"):
        parts.append(f"engine {files.key('engine.kind')}")
    if files.attempts and isinstance(files.attempts[-1].get("world_size"), int):
        world = files.attempts[-1]["world_size"]
        parts.append(f"{world} process{'es' if world != 1 else ''}")
    return " · ".join(cut(part) for part in parts if part)


def tiles(files: RunFiles, reader: MetricsReader, curves: Mapping[str, Curve]) -> list[Tile]:
    steps, speed = files.key("train.steps"), curves.get("tokens_per_second")
    share = f"{reader.step / steps:.0%} of {steps:,}" if type(steps) is int and steps > 0 else ""
    tiles = [Tile("Step", f"{reader.step:,}", share)]
    if "loss" in curves:
        tiles.append(Tile("Training loss", _value(curves["loss"].latest), "nats per token, last record"))
    tiles += [_best("Validation loss", name, curves, "val_loss/") for name in _named(curves, "val_loss/")[:2]]
    bits = _named(curves, "val_bits_per_byte/")[:1]
    tiles += [_best("Bits per byte", name, curves, "val_bits_per_byte/") for name in bits]
    tiles.append(Tile("Tokens", short_number(reader.tokens)))
    if speed:
        mean = sum(point.total for point in speed.points) / max(1, sum(point.count for point in speed.points))
        tiles.append(Tile("Tokens per second", short_number(speed.latest), f"mean {short_number(mean)}"))
    if "mfu" in curves:
        tiles.append(Tile("MFU", f"{curves['mfu'].latest:.1%}", "of the accelerators' peak"))
    tiles.append(Tile("Training time", short_time(reader.seconds), "in steps, all attempts"))
    if "memory_bytes" in curves and (highest := curves["memory_bytes"].highest()):
        tiles.append(Tile("Peak memory", f"{highest.high * GIB:.2f} GiB", "of the first rank"))
    tiles.append(Tile("Attempts", str(max(reader.attempt, len(files.attempts)))))
    skipped = [Tile("Skipped updates", f"{curve.latest:,.0f}") for curve in [curves.get("skipped_steps")] if curve]
    return tiles + [tile for tile in skipped if tile.value != "0"]


def _named(curves: Mapping[str, Curve], prefix: str) -> list[str]:
    return [name for name in curves if name.startswith(prefix)]


def _best(title: str, name: str, curves: Mapping[str, Curve], prefix: str) -> Tile:
    best, of = curves[name].lowest(), name.removeprefix(prefix)
    words = f"best {_value(best.low)} at step {best.low_at:,}" if best else ""
    return Tile(title if of == "default" else cut(f"{title}, {of}", 40), _value(curves[name].latest), words)


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else figure(value)


def problems(reader: MetricsReader) -> list[str]:
    words = []
    if reader.damaged_count:
        first = ", ".join(map(str, reader.damaged))
        count = f"{reader.damaged_count:,} line{'s' * (reader.damaged_count > 1)}"
        words.append(f"metrics.jsonl: {count} that cannot be read as records (first: {first}).")
    if not reader.curves and not reader.maps:
        words.append("There are no records yet: metrics.jsonl is missing or empty.")
    if reader.omitted_metrics:
        words.append("metrics.jsonl has more metrics than a page shows; the first ones are shown.")
    return words


def events(files: RunFiles, reader: MetricsReader) -> list[tuple[str, str]]:
    """Steps and what happened there, in the order of the records."""
    known = {entry["attempt"]: entry for entry in files.attempts}
    words: dict[str, Callable[[Event], str]] = {
        "attempt": lambda event: _began(event, known),
        "rewind": lambda event: f"Rewound from step {event.reached:,} because of a spike.",
        "changed": lambda event: cut(f"Changed by run.allow: {event.what}.", 600),
        "skipped": lambda event: f"{event.count:,} update{'s' * (event.count > 1)} skipped.",
        "spike": lambda event: f"{event.count:,} spike{'s' * (event.count > 1)} of loss or gradient norm.",
        "not_finite": lambda event: f"Loss not finite in {event.count:,} record{'s' * (event.count > 1)}.",
    }
    rows = [
        (f"{event.first:,}" + (f"–{event.last:,}" if event.last > event.first else ""), words[event.kind](event))
        for event in reader.events
    ]
    if reader.omitted_events:
        rows.append(("", f"{reader.omitted_events:,} later events are not listed."))
    state = files.state(reader.attempt, running=False)
    if state.tone != "live" and files.summary:
        rows.append((f"{reader.step:,}", cut(f"{state.word.capitalize()}. {state.words}", 600)))
    return rows


def _began(event: Event, known: Mapping[int, dict[str, Any]]) -> str:
    entry, earlier = known.get(event.count, {}), known.get(event.count - 1, {})
    world, before = entry.get("world_size"), earlier.get("world_size")
    words = f"Attempt {event.count} began" + (f"; step {event.reached:,} had been reached" if event.reached else "")
    if isinstance(world, int):
        words += f", on {world} process{'es' * (world != 1)}"
        words += f" instead of {before}" if isinstance(before, int) and before != world else ""
    return f"{words}{f' ({_time(entry)})' if entry else ''}."


def _time(entry: Mapping[str, Any]) -> str:
    return cut(str(entry.get("time", ""))[:16].replace("T", " ") + " UTC")


def main_metrics(curves: Mapping[str, Curve]) -> list[str]:
    first = [name for name in ("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "mfu") if name in curves]
    chosen = [name for name in curves if name.startswith(("val_loss/", "val_bits_per_byte/", "task/"))]
    return [*first[:1], *chosen[:MOST_ROWS], *first[1:]]


def figures(name: str, curve: Curve) -> list[str]:
    """First, last, lowest and highest value of a metric, with the steps of the last two."""
    low, high = curve.lowest(), curve.highest()
    if low is None or high is None:
        return [cut(name), "–", "not finite", "–", "–"]
    extremes = [f"{figure(low.low)} ({low.low_at:,})", f"{figure(high.high)} ({high.high_at:,})"]
    return [cut(name), figure(curve.points[0].mean), figure(curve.latest), *extremes]


def evaluations(curves: Mapping[str, Curve]) -> list[list[str]]:
    """A header, and a row for each of the last evaluations: step and every metric of validation sets and tasks."""
    names = [name for name in curves if name.startswith(("val_loss/", "val_bits_per_byte/", "task/"))][:12]
    values: dict[int, dict[str, float]] = {}
    for name in names:
        for point in curves[name].points:
            values.setdefault(point.last, {})[name] = point.mean
    rows = [
        [f"{step:,}", *(figure(values[step][name]) if name in values[step] else "–" for name in names)]
        for step in sorted(values)[-MOST_ROWS:]
    ]
    return [["step", *map(cut, names)], *rows] if rows else []


def samples(reader: MetricsReader) -> list[tuple[str, list[dict[str, str]]]]:
    """Of the last evaluation and of the first."""
    found = sorted(reader.samples.items(), reverse=True)
    return [(f"{step:,}", [_shortened(each) for each in texts[:MOST_SAMPLES]]) for step, texts in found]


def _shortened(sample: Mapping[str, str]) -> dict[str, str]:
    return {name: cut(words, SAMPLE_CHARACTERS) for name, words in sample.items()}


def attempt(entry: Mapping[str, Any]) -> dict[str, str]:
    """A row of the provenance."""
    hosts, argv, versions = entry.get("hosts"), entry.get("argv"), entry.get("versions")
    packages = versions if isinstance(versions, dict) else {}
    return {
        "attempt": str(entry["attempt"]),
        "time": _time(entry),
        "commit": cut(str(entry.get("commit") or "not known")[:12]) + (" with changes" if entry.get("diff") else ""),
        "processes": cut(str(entry.get("world_size", ""))),
        "hosts": cut(", ".join(map(str, hosts)) if isinstance(hosts, list) else "", 200),
        "python": cut(str(entry.get("python", ""))),
        "system": cut(str(entry.get("system", "")), 200),
        "versions": cut(", ".join(f"{name} {version}" for name, version in packages.items() if version), 400),
        "command": redacted(cut(shlex.join(map(str, argv)) if isinstance(argv, list) else "", 2_000)),
    }
