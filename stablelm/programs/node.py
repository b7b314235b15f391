"""This host's share of a run, by torchrun: `python launch/node.py [options] --config FILE [key.path=value ...]`.

It adds what schedulers need of torchrun. A signal goes to the ranks, which commit a checkpoint however long that takes:
torchrun kills them half a minute after a SIGTERM. And the exit code is the run's own: torchrun ends with 1 after every
failure.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from stablelm.errors import EXIT_RANK_LOST, EXIT_STOPPED_EARLY, ConfigError
from stablelm.process_exit import report
from stablelm.programs import pretrain
from stablelm.programs.arguments import Parser
from stablelm.supervise import attempts
from stablelm.supervise.requeue_policy import true_code

RANK_MODULE = pretrain.__name__


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's arguments, and those of the ranks."""
    parser = Parser(
        description="Starts the ranks of one host by torchrun, passes signals on to them and ends with the run's own "
        "exit code. Start it on every host of the run.",
        epilog="All other arguments are those of launch/pretrain.py: --config FILE, --resume, key.path=value. "
        "Page: docs/outside_slurm.md.",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts of the run; default: 1")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="this host's number, from 0; default: 0")
    parser.add_argument("--master", default="", metavar="HOST:PORT", help="host 0 and a free port of it")
    parser.add_argument("--processes", type=int, metavar="P", help="ranks on this host; default: one per GPU, or 1")
    parser.add_argument(
        "--stop-with-stdin", action="store_true", help="stop as after a signal when standard input ends"
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    options, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    asked = pretrain.parse_arguments(arguments)
    try:
        check(options)
        from stablelm.config.load import load

        run_dir = Path(load(asked.config, asked.overrides).config.run.dir)
    except ConfigError as error:
        report(error)
        return error.exit_code
    node = LocalNode(run_dir)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, node.stop)
    if options.stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, daemon=True).start()
    # On a thread that is not the main one torchrun leaves the signals alone.
    with ThreadPoolExecutor(1) as pool:
        return node.code(pool.submit(run_ranks, options, arguments).result())


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that name no host of a run."""
    if options.nodes < 1 or not 0 <= options.node_rank < options.nodes:
        raise ConfigError(f"--node-rank {options.node_rank} must be from 0 to below --nodes {options.nodes}")
    host, _, port = options.master.rpartition(":")
    if options.nodes > 1 and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"--master {options.master!r} must be HOST:PORT of host 0 where --nodes is {options.nodes}")
    if options.processes is not None and options.processes < 1:
        raise ConfigError(f"--processes {options.processes} must be at least 1")


class LocalNode:
    """The ranks of this host, children of this process, and what their end means."""

    def __init__(self, run_dir: Path):
        self._run_dir, self._before = run_dir, attempts.newest(run_dir)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Asks the ranks for a checkpoint and their end; where there are none, ends at once."""
        ranks = _ranks()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)
        if not ranks:  # they have not begun, or have ended while other hosts go on
            os._exit(self.code(EXIT_STOPPED_EARLY))

    def code(self, first: int) -> int:
        """The run's exit code, where the first rank of this host to fail ended with `first` (0: none did)."""
        if first == 0:
            return 0
        summary, started = attempts.read_summary(self._run_dir), attempts.newest(self._run_dir)
        # `first` is a rank's own code, as under srun.
        return true_code(first, summary, before=self._before, started=started, launcher="srun")[0]


def _ranks() -> list[int]:
    found = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pids in found for pid in pids if _is_rank(pid)]


def _is_rank(pid: str) -> bool:
    try:
        return RANK_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


def _stop_with_stdin() -> None:
    while os.read(0, 1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def run_ranks(options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs the ranks to their end; the exit code of the first that failed, or 0."""
    import torch
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Signals are not its business here, of which it warns.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    where = ["--standalone"]
    if options.nodes > 1:
        host, _, port = options.master.rpartition(":")
        where = ["--nnodes", str(options.nodes), "--node-rank", str(options.node_rank)]
        where += ["--master-addr", host, "--master-port", port]
    processes = options.processes or torch.cuda.device_count() or 1
    # The ranks find the package that this process has found, from any folder.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    torchrun = [*where, "--nproc-per-node", str(processes), "--max-restarts", "0", "-m", RANK_MODULE, *arguments]
    try:
        run.run(run.parse_args(torchrun))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except DistError as error:
        print(f"error: the hosts did not meet at {options.master} ({error})", file=sys.stderr, flush=True)
        return EXIT_RANK_LOST
    return 0
