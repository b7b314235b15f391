"""Where a run stands: what the loop advances, the records quote and `summary.json` tells at the end."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where the run stands; what `summary.json` tells when it ends."""

    step: int = 0
    tokens: int = 0
    attempt: int = 1
    loss: float | None = None
    val_loss: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    checkpointed_step: int = -1
    evaluation_due: bool = False
    """Whether the evaluation of this step was cut short by a stop, so that the next attempt makes it."""
    skipped_steps: int = 0
    """Updates left out, of those steps that count."""
    skipped_rows: int = 0
    """Bad rows that were left out of the text, with `data.bad_rows=skip`."""
    spikes: int = 0
    rewinds: int = 0
