"""Whether a run is still healthy: updates skipped in a row, and spikes of loss and gradient norm.

A spike lies `guards.threshold` spreads above the median of the last `guards.window` steps that were neither skipped
nor spikes themselves: a few values cannot move median and MAD, and spikes never enter the window.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stablelm.config.schema import GuardsConfig
from stablelm.engine.interface import StepResult
from stablelm.engine.process.torch_settings import repeats
from stablelm.engine.ranks import Ranks
from stablelm.errors import DivergedError
from stablelm.observe.progress import Progress
from stablelm.train.stop import Outcome

NO_UPDATE = -1.0
"""As the largest gradient norm of a step: nothing is updated, whatever comes out."""
LAG = 3
"""A step is compared with steps at least this much earlier, whether or not later figures are known yet."""
SPREADS_A_MAD = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.005  # of the median: where figures hardly vary, small changes are not spikes


class Typical(NamedTuple):
    """Median and spread of the window."""

    median: float
    spread: float

    def distance(self, value: float) -> float:
        """How many spreads above the median."""
        return (value - self.median) / self.spread


class Guard:
    """Judges steps in their order, on all ranks alike; what it knows goes into checkpoints."""

    def __init__(self, config: GuardsConfig, progress: Progress, message: Callable[[str], None]):
        self._config, self._progress, self._message = config, progress, message
        self._in_a_row = 0
        self._window: deque[tuple[int, float, float]] = deque(maxlen=config.window + LAG)
        self.jumps: list[list[int]] = []
        """Batches to skip: [first data step, count] each."""
        self._typicals: dict[int, tuple[Typical, Typical] | None] = {}

    def largest_norm(self, step: int) -> float:
        """The gradient norm above which the update of `step` is skipped: inf unless `guards.spike` is skip."""
        typical = self._typical(step) if self._config.spike == "skip" else None
        return math.inf if typical is None else typical[1].median + self._config.threshold * typical[1].spread

    def judge(self, outcomes: Sequence[Outcome]) -> Outcome | None:
        """Takes in finished steps; returns the first that asks for a rewind.

        Raises DivergedError once `guards.max_skips` is exceeded.
        """
        spikes = [outcome for outcome in outcomes if self._is_spike(outcome)]
        return spikes[0] if spikes and self._config.spike == "rewind" else None

    def _is_spike(self, outcome: Outcome) -> bool:
        typical = None if self._config.spike == "none" else self._typical(outcome.step)
        far = "" if typical is None else self._far(typical, outcome)
        if outcome.skipped:
            self._skipped(outcome, far)
            return False
        self._in_a_row = 0
        if far:
            self._progress.spikes += 1
            self._message(f"step {outcome.step}: spike: {far}")
        elif self._config.spike != "none":
            self._window.append((outcome.step, outcome.loss, outcome.grad_norm))
        return bool(far)

    def _far(self, typical: tuple[Typical, Typical], outcome: Outcome) -> str:
        """What lies too far out, in words; not finite is another matter."""
        named = zip(("loss", "gradient norm"), (outcome.loss, outcome.grad_norm), typical, strict=True)
        found = [
            f"{name} {value:.4g}, {usual.distance(value):.0f} spreads above {usual.median:.4g}"
            for name, value, usual in named
            if math.isfinite(value) and usual.distance(value) > self._config.threshold
        ]
        return " and ".join(found)

    def _skipped(self, outcome: Outcome, far: str) -> None:
        self._in_a_row += 1
        if far:
            self._progress.spikes += 1
        why = far or f"loss {outcome.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
        self._message(f"step {outcome.step}: update skipped ({why}); {self._in_a_row} in a row")
        if self._in_a_row > self._config.max_skips:
            raise DivergedError(
                f"{self._in_a_row} updates in a row were skipped up to step {outcome.step}, more than "
                f"guards.max_skips={self._config.max_skips} ({why}); start again with a lower train.lr or a more "
                "stable model.method"
            )

    def _typical(self, step: int) -> tuple[Typical, Typical] | None:
        """Of loss and gradient norm; None until the window is full. Asked before a step and when it is judged."""
        if step not in self._typicals:
            known = [(loss, norm) for seen, loss, norm in self._window if seen <= step - LAG][-self._config.window :]
            self._typicals = {seen: found for seen, found in self._typicals.items() if seen >= step - LAG}
            self._typicals[step] = _typical_of(np.array(known)) if len(known) == self._config.window else None
        return self._typicals[step]

    def rewound(self, spike: Outcome, data_step: int, before: dict[str, Any]) -> None:
        """After a checkpoint was loaded, whose next batch is `data_step`; `before`: the state that it replaced."""
        first = max(data_step, self.first_jumped(spike))
        self._progress.spikes, self._progress.rewinds = before["spikes"], before["rewinds"] + 1
        self.jumps = [*before["jumps"], [first, self._config.skip_data]]
        self._message(
            f"rewind {self._progress.rewinds} of {self._config.max_rewinds}: back to step {self._progress.step}; "
            f"batches {first + 1} to {first + self._config.skip_data} are skipped"
        )

    def first_jumped(self, spike: Outcome) -> int:
        """The data step from which batches are skipped because of a spike."""
        return max(0, spike.data_step - self._config.skip_data // 2)

    def shares(self, data_step: int, jumps: list[list[int]]) -> bool:
        """Whether the run as it is now went through the state whose next batch was `data_step`, after `jumps`."""
        return all(jump in jumps or data_step <= jump[0] for jump in self.jumps)

    def may_rewind(self, spike: Outcome) -> None:
        """Raises DivergedError if all rewinds are used up."""
        if self._progress.rewinds >= self._config.max_rewinds:
            raise DivergedError(
                f"a spike at step {spike.step} (loss {spike.loss:.4g}, gradient norm {spike.grad_norm:.4g}) after "
                f"guards.max_rewinds={self._config.max_rewinds} rewinds; start again with a lower train.lr or a more "
                "stable model.method"
            )

    def state(self) -> dict[str, Any]:
        """For `state.json`: the same on all ranks."""
        return {
            "skipped_steps": self._progress.skipped_steps,
            "skipped_in_a_row": self._in_a_row,
            "spikes": self._progress.spikes,
            "rewinds": self._progress.rewinds,
            "jumps": self.jumps,
            "window": [list(entry) for entry in self._window],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; an empty one is that of a run without guards."""
        self._progress.skipped_steps = state.get("skipped_steps", 0)
        self._progress.spikes, self._progress.rewinds = state.get("spikes", 0), state.get("rewinds", 0)
        self._in_a_row, self.jumps = state.get("skipped_in_a_row", 0), state.get("jumps", [])
        self._typicals.clear()
        self._window.clear()
        self._window.extend((step, loss, norm) for step, loss, norm in state.get("window", []))


def _typical_of(rows: np.ndarray) -> tuple[Typical, Typical]:
    """rows: (window, 2), loss and gradient norm."""
    medians = _median(rows)
    mads = _median(np.abs(rows - medians))
    found = [
        Typical(median, max(SPREADS_A_MAD * mad, LEAST_SPREAD * abs(median), 1e-12))
        for median, mad in zip(medians.tolist(), mads.tolist(), strict=True)
    ]
    return found[0], found[1]


def _median(rows: np.ndarray) -> np.ndarray:
    """Of each column; np.median takes several times as long for so few."""
    ordered = np.sort(rows, axis=0)
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2


def recheck(
    step: int,
    first: StepResult,
    take: Callable[..., StepResult],
    ranks: Ranks,
    hosts: Sequence[str],
    message: Callable[[str], None],
) -> None:
    """Takes the step `first` again, if its update was skipped, and reports whether all bits are the same. Collective.

    Nothing has changed since: weights, rows and dropout are those of the first time. Waits for the device. On GPUs the
    bits of the gradient norm count only where kernels repeat them; backward passes of attention do not otherwise.
    """
    if not bool(first.skipped):
        return
    again, exact = take(largest_norm=NO_UPDATE), repeats(ranks.device)
    before, after = ([float(result.cross_entropy), float(result.grad_norm)] for result in (first, again))
    found = differing(ranks.gather((ranks.rank, before, after)), hosts, exact=exact)
    what = "it is" if exact else "its loss is"
    if found:
        message(f"step {step}: run again, it differs ({found}): hardware, unless kernels are not deterministic")
    else:
        message(f"step {step}: run again, {what} the same in every bit: the data or the model, not the hardware")


def differing(
    results: Sequence[tuple[int, list[float], list[float]]], hosts: Sequence[str], *, exact: bool = True
) -> str:
    """Ranks whose summed loss is another at the second time, and the gradient norm if it is; '' if all are equal.

    `exact`: whether the gradient norm counts. `results`: a rank's number and its two pairs of loss (nats, of all its
    rows) and gradient norm.
    """
    words = [
        f"loss of rank {rank} on {hosts[rank]}: {before[0]:.8g}, then {after[0]:.8g}"
        for rank, before, after in results
        if not _same(before[0], after[0])
    ]
    _, before, after = results[0]
    if exact and not _same(before[1], after[1]):
        words.append(f"gradient norm: {before[1]:.8g}, then {after[1]:.8g}")
    return "; ".join(words)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
