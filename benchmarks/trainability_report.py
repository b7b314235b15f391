"""What the runs of `trainability.py` say: one row a method, a table in Markdown, the records in JSON and a figure."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stablelm.errors import DivergedError
from stablelm.observe.sinks import last_records
from stablelm.study.sensitivity import lr_sensitivity
from stablelm.supervise.attempts import read_summary

LAST = 20  # steps whose mean is the final training loss
LEARNED = 0.5  # nats below the first step's loss that a run must end at
SMOOTH = 10  # steps of the curves' running mean

# Okabe and Ito's colours, told apart by all common kinds of colour vision; a combination is its partner, dashed.
COLOURS = {
    "pre_ln": "#000000",
    "post_ln": "#D55E00",
    "deepscalelm_pre": "#0072B2",
    "deepscalelm_post": "#56B4E9",
    "magneto": "#009E73",
    "deepnorm": "#E69F00",
    "sigma_reparam": "#8C8C8C",  # in place of their yellow, which is too faint for a line on white
    "catformer": "#CC79A7",
}
PARTNERS = {"deepscalelm_sigma": "deepscalelm_pre", "magneto_sigma": "magneto", "catformer_sigma": "catformer"}
MARKERS = "osD^vP*Xdh<>"


@dataclass(frozen=True)
class Run:
    """A finished run; losses in nats per token, lists with one entry per step."""

    method: str
    lr: float
    seed: int
    warmup_steps: int
    losses: list[float]
    """NaN for a step whose update was left out, as in `grad_norms`."""
    grad_norms: list[float]
    val_loss: float
    """NaN where training ended before the evaluation."""
    unigram_loss: float
    broke_off: bool = False
    """The loss was not finite and training ended."""

    @property
    def first_loss(self) -> float:
        """Loss of the first step, which is of the weights as initialised."""
        return self.losses[0]

    @property
    def final_loss(self) -> float:
        return statistics.fmean(made(self.losses[-LAST:]))

    @property
    def diverged(self) -> bool:
        """Not finite, or at the end less than LEARNED nats below the start: it learned nothing that lasted."""
        ended_well = math.isfinite(self.final_loss) and math.isfinite(self.val_loss)
        return self.broke_off or not ended_well or not self.final_loss <= self.first_loss - LEARNED

    @property
    def grad_norms_after_warmup(self) -> list[float]:
        """Of the steps that were made; a single NaN if there are none."""
        return made(self.grad_norms[self.warmup_steps :] or self.grad_norms)

    def as_dict(self) -> dict[str, Any]:
        norms = self.grad_norms_after_warmup
        return {
            "method": self.method,
            "lr": self.lr,
            "seed": self.seed,
            "steps": len(self.losses),
            "first_loss": self.first_loss,
            "final_loss": self.final_loss,
            "val_loss": self.val_loss,
            "unigram_loss": self.unigram_loss,
            "grad_norm_largest": max(norms),
            "grad_norm_median": statistics.median(norms),
            "diverged": self.diverged,
        }


def made(values: Sequence[float]) -> list[float]:
    """Those of steps whose update was made; a single NaN if there are none."""
    return [value for value in values if not math.isnan(value)] or [math.nan]


def name_of(method: str, lr: float, seed: int) -> str:
    """Directory of a run, below the folder of all."""
    return f"{method}-lr{lr:g}-seed{seed}"


def read_run(run_dir: Path) -> Run:
    """A finished run from its config.yaml, metrics.jsonl and summary.json."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    summary = read_summary(run_dir)
    records = [record for record in last_records(run_dir / "metrics.jsonl").values() if "loss" in record]
    return Run(
        method=config["model"]["method"],
        lr=config["train"]["lr"],
        seed=config["run"]["seed"],
        warmup_steps=config["train"]["warmup_steps"],
        losses=[record["loss"] for record in records],
        grad_norms=[record["grad_norm"] for record in records],
        val_loss=(summary.get("val_loss") or {}).get("default", math.nan),
        unigram_loss=summary.get("unigram_loss", {}).get("default", math.nan),
        broke_off=summary["exit_code"] == DivergedError.exit_code,
    )


def read_runs(folder: Path) -> list[Run]:
    """All finished runs below the folder."""
    finished = (0, DivergedError.exit_code)
    found = sorted(path for path in folder.iterdir() if read_summary(path).get("exit_code") in finished)
    return [read_run(path) for path in found]


def best_lr(runs: Sequence[Run]) -> float:
    """Learning rate of the lowest validation loss among runs that did not diverge; the smallest if all did."""
    good = [run for run in runs if not run.diverged]
    return min(good, key=lambda run: run.val_loss).lr if good else min(run.lr for run in runs)


def row_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The row of one method, of all its runs; seed 0 alone decides the best learning rate and the sensitivity."""
    first_seed = {run.lr: run for run in sorted(runs, key=lambda run: run.lr) if run.seed == 0}
    best = best_lr(list(first_seed.values()))
    at_best = [run for run in runs if run.lr == best]
    losses = [run.val_loss for run in at_best]
    norms = made([norm for run in at_best for norm in run.grad_norms_after_warmup])
    counted = {lr: math.nan if run.diverged else run.val_loss for lr, run in first_seed.items()}
    some = any(not run.diverged for run in first_seed.values())
    return {
        "method": runs[0].method,
        "best_lr": best,
        "val_loss_mean": statistics.fmean(losses),
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": len(losses),
        "val_loss_by_lr": {f"{lr:g}": run.val_loss for lr, run in first_seed.items()},
        "diverged_by_lr": {f"{lr:g}": run.diverged for lr, run in first_seed.items()},
        "lr_sensitivity": lr_sensitivity(counted, first_seed[best].first_loss) if some else None,
        "grad_norm_largest": max(norms),
        "grad_norm_median": statistics.median(norms),
        "diverged": sum(run.diverged for run in runs),
        "runs": len(runs),
    }


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each method with a run of seed 0, from the lowest validation loss to the highest."""
    methods = sorted({run.method for run in runs if run.seed == 0})
    rows = [row_of([run for run in runs if run.method == method]) for method in methods]
    return sorted(rows, key=lambda row: (math.isnan(row["val_loss_mean"]), row["val_loss_mean"]))


def table(rows: Sequence[dict[str, Any]], settings: dict[str, Any], unigram_loss: float) -> str:
    """Markdown: what was run, the table and how to read it."""
    lrs = sorted({lr for row in rows for lr in row["val_loss_by_lr"]}, key=float)
    titles = ["method", "best lr", "val loss at best lr", *(f"at {lr}" for lr in lrs), "LR sensitivity"]
    titles += ["grad norm, largest (median)", "diverged"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [row["method"], f"{row['best_lr']:g}", _spread(row)]
        cells += [_at(row, lr) for lr in lrs]
        # Over fewer rates than the other rows have it would be another quantity.
        whole = row["lr_sensitivity"] is not None and len(row["val_loss_by_lr"]) == len(lrs)
        cells += [f"{row['lr_sensitivity']:.3f}" if whole else "—"]
        cells += [f"{row['grad_norm_largest']:.2f} ({row['grad_norm_median']:.2f})", f"{row['diverged']}/{row['runs']}"]
        lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{_what(settings, unigram_loss)}\n\n{text}\n\n{READING}\n"


READING = f"""\
Validation loss in nats per token: mean ± standard deviation over the seeds at the best learning rate, then seed 0 at
each one; × marks a run that diverged: its loss was not finite, or its training loss, a mean of the last {LAST} steps,
ended less than {LEARNED} nats below that of the first step. LR sensitivity (Wortsman et al., 2023) is the mean over
the learning rates of min(loss, initial loss) - best loss, where a diverged run counts as the initial loss. Gradient
norms are before clipping, after the warm-up, of the runs at the best learning rate."""


def _what(settings: dict[str, Any], unigram_loss: float) -> str:
    shape = f"{settings['model.n_layers']} layers x {settings['model.d_model']}"
    batch = f"{settings['train.global_batch_size']} x {settings['data.seq_len']} tokens"
    return (
        f"{shape}, {settings['train.steps']} steps of {batch}, warm-up of {settings['train.warmup_steps']} steps, then "
        f"{settings['train.schedule']} to a tenth, AdamW, gradients clipped at {settings['train.grad_clip']:g}. "
        f"Every method has activation {settings['model.activation']} and position "
        f"{settings['model.attention.position']}, also where its own default is another. "
        f"The unigram baseline of the training tokens has a validation loss of {unigram_loss:.3f}."
    )


def _spread(row: dict[str, Any]) -> str:
    spread = "" if row["val_loss_std"] is None else f" ± {row['val_loss_std']:.3f}"
    return f"{row['val_loss_mean']:.3f}{spread} ({row['seeds']})"


def _at(row: dict[str, Any], lr: str) -> str:
    if lr not in row["val_loss_by_lr"]:
        return ""
    return f"{row['val_loss_by_lr'][lr]:.3f}" + (" ×" if row["diverged_by_lr"][lr] else "")


def write_report(runs: Sequence[Run], settings: dict[str, Any], out: Path) -> None:
    """Writes trainability.json, .md and .png; nothing while no run of seed 0 has finished."""
    rows = rows_of(runs)
    if not rows:
        return
    out.mkdir(parents=True, exist_ok=True)
    known = [run.unigram_loss for run in runs if math.isfinite(run.unigram_loss)]
    unigram_loss = known[0] if known else math.nan
    told = {"settings": settings, "methods": rows, "runs": [run.as_dict() for run in runs]}
    (out / "trainability.json").write_text(json.dumps(_plain(told), indent=1, allow_nan=False) + "\n")
    (out / "trainability.md").write_text(table(rows, settings, unigram_loss))
    draw(runs, rows, unigram_loss, out / "trainability.png")


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(runs: Sequence[Run], rows: Sequence[dict[str, Any]], unigram_loss: float, file: Path) -> None:
    """Left: training loss at the best learning rate, seed 0; right: validation loss against the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for row in rows:
        style = style_of(row["method"])
        mine = sorted((r for r in runs if r.method == row["method"] and r.seed == 0), key=lambda run: run.lr)
        curve = next(run.losses for run in mine if run.lr == row["best_lr"])
        left.plot(*smoothed(curve), **{**style, "marker": ""}, label=f"{row['method']}, {row['best_lr']:g}")
        # A run without a validation loss is drawn at the loss it started from.
        heights = [run.val_loss if math.isfinite(run.val_loss) else run.first_loss for run in mine]
        right.plot([run.lr for run in mine], heights, **style, markersize=5)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if math.isfinite(unigram_loss):
            axes.axhline(unigram_loss, color="0.4", linestyle=":", linewidth=1)
    left.set(xlabel="step", ylabel="training loss, nats per token", title="at each method's best learning rate")
    right.set(
        xlabel="peak learning rate", ylabel="validation loss, nats per token", title="final; dotted: unigram baseline"
    )
    right.set_xscale("log")
    figure.legend(loc="outside right center", frameon=False, fontsize=8, title="method, best lr")
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def style_of(method: str) -> dict[str, Any]:
    """Colour, dashes and marker of a method."""
    names = [*COLOURS, *PARTNERS]
    place = names.index(method) if method in names else len(names) + sum(method.encode())
    colours = list(itertools.islice(itertools.cycle(COLOURS.values()), len(names)))
    return {
        "color": COLOURS.get(PARTNERS.get(method, method), colours[place % len(colours)]),
        "linestyle": "--" if method in PARTNERS or method not in COLOURS else "-",
        "marker": MARKERS[place % len(MARKERS)],
        "linewidth": 1.4,
    }


def smoothed(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """(steps, running means) over the last SMOOTH steps of each."""
    steps = list(range(1, len(losses) + 1))
    return steps, [statistics.fmean(made(losses[max(0, step - SMOOTH) : step])) for step in steps]
