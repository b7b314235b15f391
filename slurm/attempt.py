"""Answers for the shell scripts of this folder: where a run is, how an attempt ended, whether another may follow.

A small process on a busy node: nothing here imports torch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm import json_text
from stablelm.checkpoint import manifest, selection
from stablelm.checkpoint.remote_path import CheckpointPath, checkpoint_path
from stablelm.config.load import load
from stablelm.errors import CheckpointError, ConfigError, UserError
from stablelm.new_files import make_folder, open_to_append, replace_file
from stablelm.observe import provenance
from stablelm.printable import printable
from stablelm.programs.arguments import Parser, local_path
from stablelm.small_files import read_small
from stablelm.supervise import attempts
from stablelm.supervise.attempts import read_summary
from stablelm.supervise.requeue_policy import FRUITLESS, FRUITLESS_ATTEMPTS, REQUEUED, Decision, decide, true_code

NAMED = ("STABLELM_", "NCCL_", "GLOO_", "TORCH", "CUDA", "OMP_", "FI_", "UCX_", "PATH", "LD_LIBRARY_", "LOADEDMODULES")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def checkpoints(run_dir: Path, own: bool = True) -> list[CheckpointPath]:
    """Committed checkpoints, the newest first. Raises UserError or OSError where the store does not answer.

    `own`: the run is the caller's, so that they may lie where its configuration says.
    """
    try:
        found = selection.step_directories(selection.checkpoints_root(checkpoint_path(str(run_dir))))
    except CheckpointError:
        return []
    asked = selection.configured_root(run_dir) if own and not found else None
    return selection.step_directories(checkpoint_path(asked)) if asked else found


def committed_step(run_dir: Path) -> int | None:
    """Step of the newest commit, -1 where there is none yet, None where the store does not answer."""
    try:
        steps = checkpoints(run_dir)
    except (UserError, OSError):
        return None
    return (manifest.step_of(steps[0]) or 0) if steps else -1


class Entry(TypedDict):
    """A line of attempts.jsonl."""

    job: str
    time: int
    restart: NotRequired[int]
    from_step: NotRequired[int | None]
    begun: NotRequired[int]
    code: NotRequired[int]
    step: NotRequired[int | None]


class History:
    """`run.dir/slurm/attempts.jsonl`: a line at the start and at the end of each attempt of this job."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "slurm" / "attempts.jsonl"
        self.job = os.environ.get("SLURM_JOB_ID", "")
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def lines(self) -> list[dict[str, Any]]:
        try:
            lines = read_small(self.path).splitlines()
        except OSError:
            return []
        entries = [line for line in map(_entry, lines) if line is not None]
        return [line for line in entries if line["job"] == self.job]

    def add(self, **values: Any) -> None:
        self.path.parent.parent.mkdir(parents=True, exist_ok=True)
        make_folder(self.path.parent)
        entry = {"job": self.job, "restart": self.restart, "time": int(time.time()), **values}
        with open_to_append(self.path) as stream:
            stream.write((json.dumps(entry) + "\n").encode())

    def fruitless(self, step: int | None) -> int:
        """Attempts in a row, up to the last one begun, after which the newest commit was still `step`."""
        starts = [line["from_step"] for line in self.lines() if "from_step" in line]
        count = 0
        while step is not None and count < len(starts) and starts[-1 - count] == step:
            count += 1
        return count

    def outages(self) -> int:
        """Attempts in a row that ended with 77."""
        codes = [line["code"] for line in self.lines() if "code" in line]
        return next((count for count, code in enumerate(reversed(codes)) if code != 77), len(codes))


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        return dict(json_text.parse(line, Entry))
    except ValueError:  # torn, as by a dead node
        return None


def attempts_begun(run_dir: Path) -> int:
    """The number of the newest attempt; runs that began before attempts had files have them in provenance.json."""
    return max([attempts.newest(run_dir), *(entry["attempt"] for entry in provenance.read(run_dir))])


def follower(run_dir: Path, before: int, job: str) -> str:
    """In words: the newest attempt after number `before`, if it is not this job's; else empty."""
    number = attempts.newest(run_dir)
    found = attempts.holder(run_dir, number) if number > before else None
    if found is None or found["slurm_job"] in (None, job):
        return ""
    who = f"attempt {number} of job {found['slurm_job']} on {found['host']}"
    return f"{who} holds {run_dir} since {found['time'][:19]} UTC"


def own_summary(run_dir: Path, job: str) -> dict[str, Any]:
    """The summary, unless it is of another job's attempt."""
    summary = read_summary(run_dir)
    found = attempts.holder(run_dir, summary.get("attempts", 0))
    return summary if found is None or found["slurm_job"] in (None, job) else {}


def limit() -> int:
    return int(os.environ.get("STABLELM_MAX_ATTEMPTS", "100"))


def begin(run_dir: Path) -> int:
    """Records the start and prints the position. Attempts that a failed node cut off count for 79 and the limit too."""
    history, step = History(run_dir), committed_step(run_dir)
    fruitless = history.fruitless(step)
    last = history.lines()[-1:] or [{}]
    lost = "from_step" in last[0]
    if fruitless >= FRUITLESS_ATTEMPTS or history.restart >= limit():
        found = decide(
            80, "", attempt=history.restart, limit=limit(), fruitless=fruitless, outages=0, backoff=0
        )  # fmt: skip
        print(found.words)
        amend_summary(run_dir, found)
        return found.code
    history.add(from_step=step, begun=attempts_begun(run_dir))
    where = "no checkpoint yet" if step == -1 else f"newest checkpoint: step {step}"
    print(where + ("; the previous attempt ended without a summary, as when a node fails" if lost else ""))
    return 0


def end(run_dir: Path, rc: int, reason: str, launcher: str) -> None:
    """Prints code, action, wait and words, separated by tabs."""
    history = History(run_dir)
    summary = own_summary(run_dir, history.job)
    begun = [line["begun"] for line in history.lines() if "begun" in line]
    started = attempts_begun(run_dir)
    before = begun[-1] if begun else started
    code, why = true_code(rc, summary, before=before, started=started, launcher=launcher)
    if summary.get("attempts", 0) <= before and (other := follower(run_dir, before, history.job)):
        code, reason, why = 78, "", f"{other}: let that one continue, or give this one another run.dir"
    step = committed_step(run_dir)
    history.add(code=code, step=step)
    found = decide(
        code,
        reason or why,
        attempt=history.restart + 1,
        limit=limit(),
        fruitless=history.fruitless(step),
        outages=history.outages(),
        backoff=int(os.environ.get("STABLELM_BACKOFF_SECONDS", "120")),
    )
    if found.code == FRUITLESS:
        amend_summary(run_dir, found)
    print(found.code, found.action, found.wait, printable(" ".join(found.words.split())), sep="\t")


def state(run_dir: Path) -> str:
    """`going`, or how the run ended; an attempt that began after the last summary keeps it going."""
    summary = read_summary(run_dir)
    code = summary.get("exit_code")
    if code is None or code in REQUEUED or attempts_begun(run_dir) > summary.get("attempts", 0):
        return "going"
    return "has finished" if code == 0 else f"has ended with {code} ({summary.get('reason', '')})"


def unevaluated(run_dir: Path, own: bool) -> list[str]:
    """`name path` of each committed checkpoint without a file in evaluations/, the oldest first."""
    done = {path.stem for path in (run_dir / "evaluations").glob("step-*.json")}
    steps = {manifest.step_name(manifest.step_of(path) or 0): path for path in reversed(checkpoints(run_dir, own))}
    return [f"{name} {path}" for name, path in steps.items() if name not in done]


def amend_summary(run_dir: Path, found: Decision) -> None:
    """Writes to `summary.json` what ended the job, where that was decided here."""
    path = run_dir / "summary.json"
    summary = read_summary(run_dir) | {"exit_code": found.code, "reason": found.words}
    replace_file(path, json.dumps(summary, indent=2) + "\n")


def report(run_dir: Path) -> None:
    """The summary at the end of a job's log."""
    history, summary = History(run_dir), read_summary(run_dir)
    starts = [line for line in history.lines() if "from_step" in line]
    print(f"---- run {run_dir}: attempt {history.restart + 1} of job {history.job}")
    if starts:
        print(f"     seconds       {int(time.time()) - starts[-1]['time']}")
        print(f"     commits       from step {starts[-1]['from_step']} to step {committed_step(run_dir)}")
    if starts and summary.get("attempts", 0) <= starts[-1]["begun"]:
        print("     it wrote no summary: its processes were killed, or ended before the run began")
        return
    for name in ("exit_code", "reason", "step", "tokens", "loss", "val_loss", "tokens_per_second"):
        if summary.get(name) not in (None, {}):
            print(printable(f"     {name:<13} {summary[name]}"))


def where(words: list[str]) -> str:
    """The absolute run directory of `CONFIG... key=value...`. Raises ConfigError."""
    files, keys = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    return os.path.abspath(load(files, keys).config.run.dir)


def numbered_runs(file: Path) -> dict[int, list[str]]:
    """Arguments by number of line, from 1; empty lines and those that begin with # are not runs."""
    lines = enumerate(file.read_text().splitlines(), 1)
    return {number: words for number, line in lines if (words := shlex.split(line, comments=True))}


def unfinished(file: Path) -> list[int]:
    """Lines of FILE whose run has not finished. Raises ConfigError where a line is wrong or two share a directory."""
    found, seen = [], {}
    for number, words in numbered_runs(file).items():
        try:
            run_dir = where(words)
        except ConfigError as error:
            raise ConfigError(f"{file}:{number}: {error}") from error
        if run_dir in seen:
            raise ConfigError(f"{file}:{number}: run.dir={run_dir} is that of line {seen[run_dir]}; give it its own")
        seen[run_dir] = number
        if read_summary(run_dir).get("exit_code") != 0:
            found.append(number)
    return found


def environment() -> list[str]:
    """What an attempt's results may depend on outside our own code; of the variables only named ones, for secrets."""
    packages = {str(found.metadata["Name"]).lower(): found.version for found in importlib.metadata.distributions()}
    variables = {k: v for k, v in os.environ.items() if k.startswith(NAMED) and not k.endswith(SECRET)}
    return [
        f"python {platform.python_version()} {sys.executable}",
        *(f"{name}=={version}" for name, version in sorted(packages.items())),
        *(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="attempt.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("where").add_argument("words", nargs="+")
    commands.add_parser("environment")
    commands.add_parser("unfinished").add_argument("file", type=local_path)
    line = commands.add_parser("line")
    line.add_argument("file", type=local_path)
    line.add_argument("number", type=int)
    for name in ("begin", "end", "report", "state", "unevaluated"):
        command = commands.add_parser(name)
        command.add_argument("run_dir", type=local_path)
        if name == "unevaluated":
            command.add_argument("--own", action="store_true", help="look where the run's configuration says as well")
        if name == "end":
            command.add_argument("--rc", type=int, required=True)
            command.add_argument("--reason", default="")
            command.add_argument("--launcher", default="srun")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.command == "where":
            print(where(options.words))
        elif options.command == "environment":
            print("\n".join(environment()))
        elif options.command == "unfinished":
            print(",".join(map(str, unfinished(options.file))))
        elif options.command == "line":
            sys.stdout.write("".join(word + "\0" for word in numbered_runs(options.file).get(options.number, [])))
        elif options.command == "begin":
            return begin(options.run_dir)
        elif options.command == "end":
            end(options.run_dir, options.rc, options.reason, options.launcher)
        elif options.command == "report":
            report(options.run_dir)
        elif options.command == "state":
            print(printable(state(options.run_dir)))
        elif options.command == "unevaluated":
            print("\n".join(unevaluated(options.run_dir, options.own)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
