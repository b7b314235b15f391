"""What the loop works with."""

from collections.abc import Callable
from dataclasses import dataclass

from stablelm.checkpoint.background import Saver
from stablelm.config.schema import Config
from stablelm.data.loader import Loader
from stablelm.data.validation import ValidationSet
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.observe.layers import LayerObserver
from stablelm.observe.profile import Profiler
from stablelm.observe.progress import Progress
from stablelm.supervise.faults import Faults
from stablelm.supervise.heartbeat import Watch
from stablelm.train.guards import Guard
from stablelm.train.records import Records
from stablelm.train.stop import Outcome, Stop


@dataclass
class Job:
    """Everything the loop works with, built by `train.run`."""

    config: Config
    engine: Engine
    ranks: Ranks
    loader: Loader
    validation: dict[str, ValidationSet]
    progress: Progress
    stop: Stop
    guard: Guard
    faults: Faults
    watch: Watch
    profiler: Profiler
    layers: LayerObserver
    records: Records
    saver: Saver
    save: Callable[[bool], None]
    """Saves the current state; with True it returns once that is committed, else as soon as training can go on."""
    rewind: Callable[[Outcome], bool]
    """Returns to the newest checkpoint; False, and nothing is changed, if there is none."""
