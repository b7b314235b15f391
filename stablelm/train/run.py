"""One attempt at a run, from a prepared configuration to an exit code."""

import dataclasses
from contextlib import suppress
from shlex import quote
from socket import gethostname

from stablelm.checkpoint import saved_run
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.checkpoint.selection import CHECKPOINTS
from stablelm.command_names import typed
from stablelm.config.schema import Config
from stablelm.config.trust import believed
from stablelm.engine.peak_memory import choice
from stablelm.engine.process import environment
from stablelm.engine.process.compilation import check_compile, obstacle, settled
from stablelm.engine.process.compile_cache import CompileCache
from stablelm.engine.process.torch_settings import arrange_heap, set_switches
from stablelm.engine.ranks import Ranks, check_float8, check_precision, connect, disconnect
from stablelm.errors import EXIT_FINISHED, EXIT_STOPPED_EARLY, ConfigError, UserError
from stablelm.evaluate.consent import needs_consent
from stablelm.model.attention.attention_kernels import described, gpu_of, order, preferred
from stablelm.model.linear import make_dtypes
from stablelm.observe.progress import Progress
from stablelm.observe.sinks.loggers import where_curves_are
from stablelm.supervise.attempts import read_summary
from stablelm.supervise.heartbeat import Watchdog
from stablelm.supervise.shutdown import Ending
from stablelm.train import resume, run_directory
from stablelm.train.evaluation import compare_with_unigram
from stablelm.train.job import Job, build_job
from stablelm.train.loop import train
from stablelm.train.prepare import Prepared, files_to_keep

LEAD_SECONDS = 60.0


def run(prepared: Prepared, *, source: str, argv: list[str], started: float) -> int:
    """Runs to the end, an early stop or a failure; returns the exit code, which `summary.json` repeats."""
    ending = Ending(prepared.config.run.dir, prepared.launch, Progress())
    try:
        ranks, reason = attempt(prepared, ending, source=source, argv=argv, started=started)
    except Exception as error:
        return ending.fail(error)
    return conclude(ending, ranks, reason)


def attempt(prepared: Prepared, ending: Ending, *, source: str, argv: list[str], started: float) -> tuple[Ranks, str]:
    """Runs to the end or an early stop; returns the ranks, still connected, and the reason of the stop, '' at the end.

    Raises what it fails with.
    """
    config = prepared.config
    # Longer than the watchdog's time-out: it names the rank at fault, which a broken collective cannot.
    timeout = max(config.observe.first_step_seconds, config.observe.hang_seconds) + LEAD_SECONDS
    # While a rank waits for a store the others wait for it.
    timeout += config.data.retry_budget
    ranks = connect(prepared.launch, prepared.kind, collective_seconds=timeout)
    prepared, notices = _settled(share_corpora(prepared, ranks), ranks)
    config = prepared.config
    assert prepared.corpora is not None
    dtype = make_dtypes(str(config.train.precision), config.model.stream_dtype).compute
    ending.progress.attempt = run_directory.create(
        config,
        prepared.asked,
        files_to_keep(config, prepared.corpora),
        prepared.tokenizer.files(),
        ranks,
        argv,
        prepared.attempt,
        attention=described(config.model, dtype, ranks.device),
    )
    ending.created = True
    ending.watchdog = Watchdog(config, ranks, ranks.gather(gethostname()), ending.progress.attempt, ending.write)
    if not ending.process_goes_on:  # a watchdog ends the process
        ending.watchdog.start()
    ranks = dataclasses.replace(ranks, passed=ending.watchdog.marker.passed)
    with preferred(order(config.model, dtype, gpu_of(ranks.device))):
        reason = _run(prepared, ranks, ending, ending.watchdog, source, started, notices)
    ending.watchdog.stop()
    return ranks, reason


def _settled(prepared: Prepared, ranks: Ranks) -> tuple[Prepared, list[str]]:
    """With what the devices decide, and lines about it; sets torch's switches. ConfigError if nothing will do."""
    config = prepared.config
    check_precision(str(config.train.precision), ranks.device)
    check_float8(config.train.float8, ranks.device)
    check_compile(config.train.compile, ranks.device)
    set_switches(config)
    arrange_heap(config, ranks.device)
    config, chosen = choice.resolved(settled(config, prepared.kind, ranks.device), prepared.kind, ranks)
    return dataclasses.replace(prepared, config=config), [chosen] if chosen else []


def conclude(ending: Ending, ranks: Ranks, reason: str) -> int:
    """Writes the summary and leaves the process groups; returns the exit code."""
    code = EXIT_STOPPED_EARLY if reason else EXIT_FINISHED
    if ranks.is_first:
        ending.write(code, reason or "finished")
    disconnect(ranks)
    ending.closing()
    return code


def share_corpora(prepared: Prepared, ranks: Ranks) -> Prepared:
    """Gives every rank rank 0's file lists, which were read once. ConfigError where ranks have other tokenizers."""
    found = ranks.consensus().first(lambda: prepared.corpora)
    assert found is not None
    ranks.consensus().run(lambda: _check_tokenizer(prepared, found.identity["data.tokenizer"]))
    return dataclasses.replace(prepared, corpora=found)


def _check_tokenizer(prepared: Prepared, sha256: str) -> None:
    """ConfigError if this rank found another tokenizer than rank 0, as on hosts with files of their own."""
    if prepared.tokenizer.sha256 != sha256:
        raise ConfigError(
            f"data.tokenizer: {prepared.tokenizer.path!r} is another file on {gethostname()} than on the first host; "
            "copy the same one to every host"
        )


def _run(
    prepared: Prepared,
    ranks: Ranks,
    ending: Ending,
    watchdog: Watchdog,
    source: str,
    started: float,
    notices: list[str],
) -> str:
    config, corpora, progress = prepared.config, prepared.corpora, ending.progress
    assert corpora is not None and config.train.steps is not None
    fence = resume.take_over(config, ranks, progress.attempt)
    found = resume.find(config, source, ranks, notices.append)
    continued = resume.continue_as(prepared, found, source, ranks)
    prepared = dataclasses.replace(prepared, corpora=dataclasses.replace(corpora, identity=continued.identity))
    progress.evaluation_due = ranks.consensus().first(lambda: resume.evaluation_due(config, found))
    if found is not None and saved_run.read_state(found)["step"] >= config.train.steps and not progress.evaluation_due:
        return _nothing_to_do(config, ranks, ending, found)
    notices += [*continued.words(), *process_words(prepared, ranks)]
    kernels = CompileCache(config, ranks, notices.append)
    kernels.load()
    job = build_job(prepared, ranks, ending, watchdog, fence, found, started, notices)
    kernels.keep()  # the dry run has compiled what a step needs
    job.keep_kernels = kernels.keep
    if continued.change is not None:
        job.records.write({"step": progress.step, "tokens": progress.tokens, "changes": continued.change["keys"]})
    try:
        with job.collection.by_hand():
            reason = train(job)
    except BaseException:
        job.saver.settle()
        job.records.close(failed=True)
        if ranks.world_size == 1:  # no other rank waits, and what called `attempt` may go on
            _close(job)
        raise
    _finish(prepared, job, ending, reason)
    return reason


def process_words(prepared: Prepared, ranks: Ranks) -> list[str]:
    """Lines about what a run on GPUs is set to; none on CPUs."""
    if ranks.device.type == "cpu":
        return []
    words = [environment.in_words()]
    if prepared.asked.train.compile == "auto" and not prepared.config.train.compile:
        why = obstacle(ranks.device) or f"engine.kind={prepared.kind} cannot be compiled"
        words.append(f"train.compile=auto: not compiled ({why})")
    return words


def _finish(prepared: Prepared, job: Job, ending: Ending, reason: str) -> None:
    """The closing reports take one rank's time while the others wait for it."""
    config, records = job.config, job.records
    job.watchdog.stop()
    job.loader.close()
    job.profiler.close()
    if reason:
        line = f"stopped early ({reason}) at step {job.progress.step} of {config.train.steps}; run again to continue"
        records.message(line)
    elif job.ranks.is_first:
        ending.extra |= compare_with_unigram(prepared, job, records.message)
    records.message(where_to_look(config))
    records.close()


def _close(job: Job) -> None:
    for part in (job.loader, job.profiler):
        with suppress(UserError):  # what failed first is reported
            part.close()


def _nothing_to_do(config: Config, ranks: Ranks, ending: Ending, found: CheckpointPath) -> str:
    state = saved_run.read_state(found)
    if ranks.is_first:
        earlier = read_summary(config.run.dir)
        for name in ("loss", "val_loss", "tokens_per_second"):
            setattr(ending.progress, name, earlier.get(name))
        ending.extra |= {k: earlier[k] for k in ("params", "unigram_loss", "val_bits_per_byte") if k in earlier}
        print(
            f"nothing to do: {config.run.dir} has finished its {config.train.steps} steps;"
            " name another run.dir to train again"
        )
        print(where_to_look(config))
    ending.progress.step, ending.progress.tokens = state["step"], state["tokens"]
    ending.progress.checkpointed_step, ending.progress.skipped_rows = state["step"], state.get("skipped_rows", 0)
    return ""


def where_to_look(config: Config) -> str:
    """Commands that show and use the run."""
    run_dir = config.run.dir.rstrip("/")
    elsewhere = config.checkpoint.dir not in (None, f"{run_dir}/{CHECKPOINTS}")
    # What is not done for any checkpoint is done by the word of whoever pastes this.
    own = f" --config {quote(f'{run_dir}/config.yaml')}" if elsewhere or needs_consent(believed(config)) else ""
    page = f"page:     {run_dir}/report.html\n" if config.observe.page else ""
    # Its --config says it for eval; generate has none.
    generate = "" if own else f"\ngenerate: {typed('generate')} --checkpoint {quote(run_dir)} --prompt TEXT"
    curves = "".join(f"curves:   {command}\n" for command in where_curves_are(config))
    return (
        f"{page}{curves}"
        f"records:  {run_dir}/metrics.jsonl, {run_dir}/summary.json\n"
        f"evaluate: {typed('eval')} --checkpoint {quote(run_dir)}{own}{generate}"
    )
