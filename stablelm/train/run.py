"""Builds everything a run needs from a prepared configuration, runs it and says how it ended."""

import dataclasses
import math
from pathlib import Path
from socket import gethostname

from stablelm.checkpoint import saved_run
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.config.durations import parse_duration
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks, check_precision, connect, disconnect
from stablelm.errors import EXIT_FINISHED, EXIT_STOPPED_EARLY
from stablelm.observe.layers import LayerObserver
from stablelm.observe.profile import Profiler
from stablelm.observe.progress import Progress
from stablelm.supervise.faults import Faults
from stablelm.supervise.heartbeat import Watch
from stablelm.supervise.shutdown import Ending
from stablelm.train import resume as restore
from stablelm.train import rundir
from stablelm.train.build import build_loader, build_saver, layers_batch, read_validation, save
from stablelm.train.guards import Guard
from stablelm.train.job import Job
from stablelm.train.loop import train
from stablelm.train.prepare import Prepared, files_to_keep
from stablelm.train.records import Records
from stablelm.train.rehearse import rehearse
from stablelm.train.report import comparison, where_to_look
from stablelm.train.stop import Stop, deadline
from stablelm.train.summary import read_summary

LEAD_SECONDS = 60.0
SAVES_WAITED = 10
"""A save that takes up to this many times its expected length is not a hang."""


def run(prepared: Prepared, *, resume: str, argv: list[str], started: float) -> int:
    """Runs to the end, an early stop or a failure; returns the exit code, which `summary.json` repeats."""
    config, ending = prepared.config, Ending(prepared, Progress())
    try:
        # Longer than the watchdog's patience: it names the rank at fault, which a broken collective cannot.
        patience = max(config.observe.first_step_seconds, config.observe.hang_seconds) + LEAD_SECONDS
        # While a rank waits for a store the others wait for it.
        patience += config.data.retry_budget
        ranks = connect(prepared.launch, prepared.kind, collective_seconds=patience)
        ending.prepared = prepared = share_corpora(prepared, ranks)
        check_precision(str(config.train.precision), ranks.device)
        assert prepared.corpora is not None
        ending.progress.attempt = rundir.create(
            config,
            prepared.asked,
            prepared.corpora.identity,
            files_to_keep(config, prepared.corpora),
            prepared.tokenizer.path,
            ranks,
            argv,
            prepared.attempt,
        )
        ending.created = True
        ending.watch = Watch(config, ranks, ranks.gather(gethostname()), ending.progress.attempt, ending.write)
        ending.watch.start()
        reason = _run(prepared, ranks, ending, ending.watch, resume, started)
        ending.watch.stop()
    except Exception as error:
        return ending.fail(error)
    code = EXIT_STOPPED_EARLY if reason else EXIT_FINISHED
    if ranks.is_first:
        ending.write(code, reason or "finished")
    disconnect(ranks)
    return code


def share_corpora(prepared: Prepared, ranks: Ranks) -> Prepared:
    """Gives every rank rank 0's file lists, which were read once."""
    found = ranks.consensus().first(lambda: prepared.corpora)
    return dataclasses.replace(prepared, corpora=found)


def _run(prepared: Prepared, ranks: Ranks, ending: Ending, watch: Watch, resume: str, started: float) -> str:
    config, corpora, progress = prepared.config, prepared.corpora, ending.progress
    assert corpora is not None and config.train.steps is not None
    early: list[str] = []
    fence = restore.take_over(config, ranks, progress.attempt)
    found = restore.find(config, corpora.identity, resume, ranks, early.append)
    progress.evaluation_due = ranks.consensus().first(lambda: restore.evaluation_due(config, found))
    if found is not None and saved_run.read_state(found)["step"] >= config.train.steps and not progress.evaluation_due:
        return _nothing_to_do(config, ranks, ending, found)
    loader = build_loader(prepared, ranks)
    engine = build_engine(config, prepared.kind, ranks)
    ending.extra["params"] = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters())
    guard = Guard(config.guards, progress, lambda text: records.message(text))
    if found is not None:
        restore.resume_from(found, engine, loader, ranks, progress, guard)
    elif config.run.init_from:
        restore.weights_from(config.run.init_from, engine, ranks)
    records = Records(config, ranks, progress)
    for line in early:
        records.message(line)
    records.message(f"{opening(config, prepared, ending)}; " + (f"resumed from {found}" if found else "new run"))
    stop = Stop(ranks, deadline=deadline(parse_duration(config.run.time_limit), started))
    stop.listen(lambda code: ending.write(code, "second signal"))
    faults = Faults(config, ranks, progress.attempt)
    saver = build_saver(prepared, fence, ranks, progress, faults)
    watch.pulse.at("rehearsal", progress.step)
    records.message(rehearse(config, engine, ranks, saver))
    watch.extra_seconds["save"] = SAVES_WAITED * saver.seconds
    stop.save_seconds = saver.margin_seconds

    def save_now(wait: bool) -> None:
        faults.saving(progress.step)
        save(prepared, engine, loader, ranks, progress, guard, saver, wait=wait)

    job = Job(
        config=config,
        engine=engine,
        ranks=ranks,
        loader=loader,
        validation=read_validation(prepared),
        progress=progress,
        stop=stop,
        guard=guard,
        faults=faults,
        watch=watch,
        profiler=Profiler(Path(config.run.dir), config.observe, ranks.rank, progress.step),
        layers=_layers(prepared, engine, ranks, records),
        records=records,
        saver=saver,
        save=save_now,
        rewind=lambda spike: restore.rewind(spike, saver, engine, loader, ranks, progress, guard),
    )
    try:
        reason = train(job)
    except BaseException:
        saver.settle()
        raise
    _finish(prepared, job, ending, reason)
    return reason


def _finish(prepared: Prepared, job: Job, ending: Ending, reason: str) -> None:
    """What is left takes one rank's time while the others wait for it."""
    config, records = job.config, job.records
    job.watch.stop()
    job.loader.close()
    job.profiler.close()
    if reason:
        told = f"stopped early ({reason}) at step {job.progress.step} of {config.train.steps}; run again to go on"
        records.message(told)
    elif job.ranks.is_first:
        ending.extra |= comparison(prepared, job, records.message)
    records.message(where_to_look(config))
    records.close()


def _layers(prepared: Prepared, engine: Engine, ranks: Ranks, records: Records) -> LayerObserver:
    return LayerObserver(
        engine,
        engine.sigma,
        ranks,
        every=prepared.config.observe.layers_every,
        batch=lambda: layers_batch(prepared),
        pieces=prepared.tokenizer.pieces,
        record=records.write,
    )


def opening(config: Config, prepared: Prepared, ending: Ending) -> str:
    """One line: what trains on what."""
    model = config.model
    return (
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {ending.extra['params'] / 1e6:.2f} M parameters, "
        f"engine {prepared.kind} on {prepared.launch.world_size} process(es), {config.train.precision}"
    )


def _nothing_to_do(config: Config, ranks: Ranks, ending: Ending, found: CheckpointPath) -> str:
    state = saved_run.read_state(found)
    if ranks.is_first:
        earlier = read_summary(config.run.dir)
        for name in ("loss", "val_loss", "tokens_per_second"):
            setattr(ending.progress, name, earlier.get(name))
        ending.extra |= {k: earlier[k] for k in ("params", "unigram_loss", "val_bits_per_byte") if k in earlier}
        print(
            f"nothing to do: {config.run.dir} has finished its {config.train.steps} steps;"
            " name another run.dir to train anew"
        )
        print(where_to_look(config))
    ending.progress.step, ending.progress.tokens = state["step"], state["tokens"]
    ending.progress.checkpointed_step, ending.progress.skipped_rows = state["step"], state.get("skipped_rows", 0)
    return ""
