"""How far a run is: advanced by the loop, quoted in records and written to `summary.json` at the end."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far the run is; the fields of `summary.json`."""

    step: int = 0
    tokens: int = 0
    attempt: int = 1
    loss: float | None = None
    val_loss: dict[str, float] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of the last evaluation and of the best one, by step."""
    tokens_per_second: float | None = None
    checkpointed_step: int = -1
    evaluation_due: bool = False
    """Whether the evaluation of this step was cut short by a stop, so that the next attempt makes it."""
    skipped_steps: int = 0
    """Skipped updates, of those steps that count."""
    skipped_rows: int = 0
    """Bad rows that were skipped, with `data.bad_rows=skip`."""
    spikes: int = 0
    rewinds: int = 0
