"""Builds everything a run needs from a prepared configuration, runs it and says how it ended."""

import dataclasses
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from stablelm.checkpoint import keep
from stablelm.checkpoint.background import Saver
from stablelm.checkpoint.places import Place
from stablelm.config.load import parse_duration
from stablelm.config.schema import Config
from stablelm.data.loader import Loader
from stablelm.engine.base import Engine
from stablelm.engine.build import build_engine
from stablelm.engine.mesh import Ranks, check_precision, connect, disconnect
from stablelm.errors import EXIT_FINISHED, EXIT_RANK_LOST, EXIT_STOPPED_EARLY, UserError
from stablelm.observe.layers import LayerObserver
from stablelm.observe.profile import Profiler
from stablelm.train import restore, rundir
from stablelm.train.build import build_loader, build_saver, layers_batch, read_validation, save
from stablelm.train.loop import Job, train
from stablelm.train.prepare import Prepared, files_to_keep
from stablelm.train.progress import Progress
from stablelm.train.records import Records
from stablelm.train.rehearse import rehearse
from stablelm.train.report import comparison, where_to_look
from stablelm.train.start import OTHERS_WAIT_SECONDS, end_at_once, report
from stablelm.train.stop import Stop
from stablelm.train.summary import read_summary, write_summary


def run(prepared: Prepared, *, resume: str, argv: list[str], started: float) -> int:
    """Runs to the end, an early stop or a failure; returns the exit code, which `summary.json` repeats."""
    ending = Ending(prepared, Progress())
    try:
        ranks = connect(prepared.launch, prepared.kind)
        prepared = share_corpora(prepared, ranks)
        check_precision(str(prepared.config.train.precision), ranks.device)
        assert prepared.corpora is not None
        ending.progress.attempt = rundir.create(
            prepared.config,
            prepared.corpora.identity,
            files_to_keep(prepared.config, prepared.corpora),
            prepared.tokenizer.path,
            ranks,
            argv,
        )
        ending.created = True
        reason = _run(prepared, ranks, ending, resume, started)
    except UserError as error:
        report(error, prepared.launch)
        ending.write(error.exit_code, str(error))
        return _leave(prepared, error.exit_code)
    except Exception as error:
        code, words = 1, f"{type(error).__name__}: {error}"
        if _lost_a_peer(error):
            # The rank that failed says why, here and in the summary; its peers only end with it.
            time.sleep(OTHERS_WAIT_SECONDS)
            code, words = EXIT_RANK_LOST, f"rank {prepared.launch.rank} lost another rank: {str(error).splitlines()[0]}"
            print(words, file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        ending.write(code, words)
        return _leave(prepared, code)
    code = EXIT_STOPPED_EARLY if reason else EXIT_FINISHED
    if ranks.is_first:
        ending.write(code, reason or "finished")
    disconnect(ranks)
    return code


def _leave(prepared: Prepared, code: int) -> int:
    if prepared.launch.world_size > 1:
        # Peers wait in a collective that will never come: an orderly exit would wait with them.
        end_at_once(code)
    return code


def _lost_a_peer(error: Exception) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    return any(word in str(error) for word in words)


@dataclasses.dataclass
class Ending:
    """What `summary.json` will tell."""

    prepared: Prepared
    progress: Progress
    created: bool = False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, code: int, reason: str) -> None:
        """Writes the summary, if there is a run directory to write it to."""
        if not self.created:
            return
        told = dataclasses.asdict(self.progress)
        summary = {"exit_code": code, "reason": reason, "attempts": told.pop("attempt"), **told, **self.extra}
        try:
            write_summary(self.prepared.config.run.dir, summary)
        except OSError as error:
            print(f"warning: summary.json cannot be written ({error.strerror})", flush=True)


def share_corpora(prepared: Prepared, ranks: Ranks) -> Prepared:
    """Gives every rank rank 0's file lists, which were read once."""
    found = ranks.together().first(lambda: prepared.corpora)
    return dataclasses.replace(prepared, corpora=found)


def _run(prepared: Prepared, ranks: Ranks, ending: Ending, resume: str, started: float) -> str:
    config, corpora, progress = prepared.config, prepared.corpora, ending.progress
    assert corpora is not None and config.train.steps is not None
    early: list[str] = []
    fence = restore.take_over(config, ranks, progress.attempt)
    found = restore.find(config, corpora.identity, resume, ranks, early.append)
    if found is not None and keep.read_state(found)["step"] >= config.train.steps:
        return _nothing_to_do(config, ranks, ending, found)
    loader = build_loader(prepared, ranks)
    engine = build_engine(config, prepared.kind, ranks)
    ending.extra["params"] = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters())
    if found is not None:
        restore.resume_from(found, engine, loader, ranks, progress)
    elif config.run.init_from:
        restore.weights_from(config.run.init_from, engine, ranks)
    records = Records(config, ranks, progress)
    for line in early:
        records.message(line)
    records.message(f"{opening(config, prepared, ending)}; " + (f"resumed from {found}" if found else "new run"))
    limit = parse_duration(config.run.time_limit)
    stop = Stop(ranks, deadline=started + limit if limit is not None else None)
    stop.listen(lambda code: ending.write(code, "second signal"))
    saver = build_saver(prepared, fence, ranks, progress)
    records.message(rehearse(config, engine, ranks, saver))
    stop.margin_seconds = saver.margin_seconds
    job = _job(prepared, ranks, engine, loader, progress, stop, saver, records)
    try:
        reason = train(job)
    except BaseException:
        saver.settle()
        raise
    loader.close()
    job.profiler.close()
    if reason:
        records.message(f"stopped early ({reason}) at step {progress.step} of {config.train.steps}; run again to go on")
    elif ranks.is_first:
        ending.extra |= comparison(prepared, job, records.message)
    records.message(where_to_look(config))
    records.close()
    return reason


def _job(
    prepared: Prepared,
    ranks: Ranks,
    engine: Engine,
    loader: Loader,
    progress: Progress,
    stop: Stop,
    saver: Saver,
    records: Records,
) -> Job:
    config = prepared.config
    return Job(
        config=config,
        engine=engine,
        ranks=ranks,
        loader=loader,
        validation=read_validation(prepared),
        progress=progress,
        stop=stop,
        profiler=Profiler(Path(config.run.dir), config.observe, ranks.rank, progress.step),
        layers=LayerObserver(
            engine,
            engine.sigma,
            ranks,
            every=config.observe.layers_every,
            batch=lambda: layers_batch(prepared),
            pieces=prepared.tokenizer.pieces,
            record=records.write,
        ),
        record=records.write,
        saver=saver,
        save=lambda wait: save(prepared, engine, loader, ranks, progress, saver, wait=wait),
    )


def opening(config: Config, prepared: Prepared, ending: Ending) -> str:
    """One line: what trains on what."""
    model = config.model
    return (
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {ending.extra['params'] / 1e6:.2f} M parameters, "
        f"engine {prepared.kind} on {prepared.launch.world_size} process(es), {config.train.precision}"
    )


def _nothing_to_do(config: Config, ranks: Ranks, ending: Ending, found: Place) -> str:
    state = keep.read_state(found)
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
    ending.progress.checkpointed_step = state["step"]
    return ""
