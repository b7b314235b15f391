"""Where a run begins: at step 0, at its newest valid checkpoint, or with another run's weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stablelm.checkpoint import contents, saved_run, selection
from stablelm.checkpoint.background import Saver
from stablelm.checkpoint.best import from_state
from stablelm.checkpoint.fence import Fence, take
from stablelm.checkpoint.format import load_tensors
from stablelm.checkpoint.manifest import step_of
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.checkpoint.weights import EvaluatedWeights
from stablelm.config import identity as identities
from stablelm.config import segments
from stablelm.config.averages import NONE, Average
from stablelm.config.schema import Config
from stablelm.data.loader import Loader
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name
from stablelm.errors import CheckpointError, ConfigError
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import last_records
from stablelm.train import run_directory
from stablelm.train.guards import Guard
from stablelm.train.prepare import Prepared, refuse_other_run
from stablelm.train.stop import Outcome


def take_over(config: Config, ranks: Ranks, attempt: int) -> Fence:
    """Makes this attempt the only one that can commit to the run's checkpoints. Collective, before `find`.

    Raises StorageError if they cannot be written.
    """
    return ranks.consensus().first(lambda: take(checkpoint_path(str(config.checkpoint.dir)), str(attempt)))


def find(config: Config, resume: str, ranks: Ranks, message: Callable[[str], None]) -> CheckpointPath | None:
    """The checkpoint to resume from, verified file by file by all ranks, or None for a new run. Collective.

    Raises CheckpointError if the one asked for is damaged.
    """
    if resume == "none":
        return None
    consensus, damaged = ranks.consensus(), []
    if resume == "auto":
        root = checkpoint_path(str(config.checkpoint.dir))

        def skip(path: CheckpointPath, why: str) -> None:
            damaged.append(f"{path} is damaged ({why})")
            message(f"warning: {damaged[-1]}; trying the one before it")

        found = selection.newest_valid(root, on_damaged=skip, consensus=consensus, lacks=contents.problems)
        if found is None and (newest := consensus.first(lambda: damaged[:1])):
            raise CheckpointError(
                f"no checkpoint in {root} is intact: {newest[0]}; restore one from a copy, or start a new "
                "run under another run.dir"
            )
        return found
    return selection.resolve_checkpoint(resume, consensus=consensus, lacks=contents.problems)


@dataclass(frozen=True)
class Continued:
    """What the run is from here on, and the change at this checkpoint, if there is one."""

    identity: dict[str, Any]
    change: segments.Segment | None = None

    def words(self) -> list[str]:
        """The change in a line."""
        if self.change is None:
            return []
        listed = (f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in self.change["keys"].items())
        return [f"changed after step {self.change['step']}: {', '.join(listed)}"]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def continue_as(prepared: Prepared, found: CheckpointPath | None, resume: str, ranks: Ranks) -> Continued:
    """The run's identity with its changes so far and a new one, written to its directory. Collective.

    Raises ConfigError if the checkpoint is another run's, or differs in what may not change here.
    """
    assert prepared.corpora is not None
    current, run_dir = prepared.corpora.identity, Path(prepared.config.run.dir)

    def decide() -> Continued:
        try:
            known = run_directory.read_identity(run_dir)
        except (OSError, ValueError):  # of a run that has not begun
            known = {}
        continued = _begun(known, current) if found is None else _continued(prepared, found, known, resume)
        run_directory.write_identity(run_dir, continued.identity)
        return continued

    return ranks.consensus().first(decide)


def _begun(known: dict[str, Any], current: dict[str, Any]) -> Continued:
    """A run at its beginning; one that lost its checkpoints changes again where it did."""
    same = known and not identities.differences(known, current)
    return Continued(segments.with_segments(current, segments.segments_of(known) if same else []))


def _continued(prepared: Prepared, found: CheckpointPath, known: dict[str, Any], resume: str) -> Continued:
    """`known`: the identity of the run's last attempt, empty where the checkpoint is from another directory."""
    assert prepared.corpora is not None
    current, state = prepared.corpora.identity, saved_run.read_state(found)
    saved, step = state["identity"], state["step"]
    kept = segments.segments_of(saved)
    all_known = segments.segments_of(known) if known else kept
    whole = segments.with_segments(current, all_known)
    later = all_known[len(kept) :]
    same_past = all_known[: len(kept)] == kept and all(segment["step"] >= step for segment in later)
    if same_past and not identities.differences(saved, segments.undone(whole, len(kept)), step=step):
        return Continued(whole)
    allowed = segments.allowed(prepared.asked)
    refuse_other_run(saved, current, str(found), step=step, allowed=allowed)
    if resume != "auto":
        _refuse_later_steps(checkpoint_path(str(prepared.config.checkpoint.dir)), step)
    differing = identities.changes(saved, current)
    changes = {name: list(values) for name, values in differing.items() if name in allowed}
    if wrong := segments.refused(changes, step, state["data"]["data_step"]):
        raise ConfigError("\n".join(wrong))
    if not changes:
        return Continued(segments.with_segments(current, kept))
    change: segments.Segment = {"step": step, "keys": changes}
    return Continued(segments.with_segments(current, [*kept, change]), change)


def _refuse_later_steps(root: CheckpointPath, step: int) -> None:
    """Where a run changes at an earlier checkpoint than its newest: the later ones would belong to another run."""
    newest = next(iter(selection.step_directories(root)), None)
    if newest is not None and (step_of(newest) or 0) > step:
        raise ConfigError(
            f"{newest} is of a later step than the checkpoint from which the run would change; name another run.dir, "
            "or resume from that one"
        )


def evaluation_due(config: Config, found: CheckpointPath | None) -> bool:
    """Whether the evaluation of a checkpoint's step was cut short, and no attempt has made it since."""
    state, records = saved_run.read_state(found) if found else {}, Path(config.run.dir) / "metrics.jsonl"
    if not state.get("evaluation_due", False):
        return False
    made = last_records(records).get(state["step"], {}) if records.exists() else {}
    return not any(name.startswith(("val_loss/", "task/")) for name in made)


def load_checkpoint(
    checkpoint: CheckpointPath, engine: Engine, loader: Loader, ranks: Ranks, progress: Progress, guard: Guard
) -> int:
    """Loads weights, moments, position in the data and counters, in place; returns the next batch's data step."""
    load_tensors(checkpoint / "tensors", engine.tensors(), ranks.cpu_group)
    engine.loaded()
    state = saved_run.read_state(checkpoint)
    loader.load(state["data"])
    progress.step, progress.tokens = state["step"], state["tokens"]
    progress.checkpointed_step, progress.skipped_rows = state["step"], state.get("skipped_rows", 0)
    progress.evaluations = from_state(state)
    guard.load(state.get("guards", {}))
    loader.skip(guard.jumps)
    return int(state["data"]["data_step"])


def rewind(
    spike: Outcome, saver: Saver, engine: Engine, loader: Loader, ranks: Ranks, progress: Progress, guard: Guard
) -> bool:
    """Returns to a checkpoint from before the spike, and skips the batches around it from there. Collective.

    It is the newest one that has seen none of these batches, so that the result does not depend on where the run was
    saved; the newest of all if every one has seen some. False, with nothing changed, if there is none. Raises
    DivergedError if all rewinds are used up.
    """
    saver.wait()
    consensus = ranks.consensus()
    places = consensus.first(lambda: candidates(saver.fence.root, guard, spike))
    found = next((path for path in places if not selection.verify_together(path, consensus, contents.problems)), None)
    if found is None:
        return False
    guard.may_rewind(spike)
    before = guard.state()
    guard.rewound(spike, load_checkpoint(found, engine, loader, ranks, progress, guard), before)
    loader.skip(guard.jumps)
    return True


def candidates(root: CheckpointPath, guard: Guard, spike: Outcome) -> list[CheckpointPath]:
    """Checkpoints to which a spike may return the run, the best first; not yet verified."""
    unseen, others = [], []
    for path in selection.step_directories(root):
        try:
            state = saved_run.read_state(path)
        except CheckpointError:
            continue
        data_step, jumps = state["data"]["data_step"], state.get("guards", {}).get("jumps", [])
        if state["step"] < spike.step and guard.shares(data_step, jumps):
            (unseen if data_step <= guard.first_jumped(spike) else others).append(path)
    return unseen + others


def weights_from(path: str, engine: Engine, ranks: Ranks) -> None:
    """Loads the weights alone, of a run or checkpoint directory, into a new run."""
    found = selection.resolve_checkpoint(
        path, consensus=ranks.consensus(), lacks=partial(contents.problems, optimizer=False)
    )
    try:
        weights = EvaluatedWeights(found, saved_run.saved(found).train, Average(NONE))
        names = {clean_name(name) for name, _ in engine.module.named_parameters()}
        weights.load(engine.tensors(optimizer=False), names, ranks.cpu_group)
    except CheckpointError as error:
        raise ConfigError(f"run.init_from={found} does not fit this model: {error}") from error
    engine.loaded(weights_alone=True)
