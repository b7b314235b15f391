"""Faults that strike a run on the test cluster, each with its repair."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from support.slurm import SCRIPT, Cluster

DATA_HOST = "10.99.0.254"
DATA_PORT = 8123


class DataServer:
    """Serves a folder over HTTP from the controller's host, which all nodes reach; `log` gets a line a request."""

    def __init__(self, cluster: Cluster, folder: Path, log: Path):
        self._command = [
            str(SCRIPT), "exec", str(cluster.directory), sys.executable, str(Path(__file__).with_name("httpserver.py")),
            str(folder), DATA_HOST, str(DATA_PORT),
        ]  # fmt: skip
        self._log, self._process = log, None
        self.start()

    def start(self) -> None:
        if self._process is None:
            with open(self._log, "a") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        if self._process is not None:
            # nsenter forks: its child is in the same session.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@dataclass
class Target:
    """The run that is punished."""

    cluster: Cluster
    job: str
    server: DataServer
    drawer: Random
    off: set[str] = field(default_factory=set)
    """Nodes that are to stay away: powered off or cut off, not yet repaired."""

    def processes(self, *words: str) -> list[int]:
        """Pids, as this machine sees them, of the cluster's processes whose command line has all of `words`."""
        mark = f"SLURM_CONF={self.cluster.directory}/etc/slurm.conf".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in line for word in words) and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def one_rank(self) -> int | None:
        """One of the ranks; None while there are none."""
        found = [pid for pid in self.processes("launch/pretrain.py") if b"srun" not in _name(pid)]
        return self.drawer.choice(sorted(found)) if found else None

    def nodes(self) -> list[str]:
        listed = self.cluster.about(self.job).get("NodeList", "(null)")
        if "null" in listed:
            return []
        return self.cluster.client("scontrol", "show", "hostnames", listed).split()

    def one_node(self) -> str | None:
        found = self.nodes()
        return self.drawer.choice(found) if found else None

    def states(self) -> dict[str, str]:
        """State by node, as `idle` or `down*`; empty while the controller is away."""
        try:
            told = self.cluster.client("sinfo", "--noheader", "--Node", "--format=%N %T")
        except AssertionError:
            return {}
        return dict(line.split() for line in told.splitlines())

    def away(self) -> int:
        """How many nodes cannot take a job."""
        return sum(not state.startswith(UP) for state in self.states().values())

    def tend(self) -> None:
        """What an administrator does: brings nodes back that are sound again."""
        for node, state in self.states().items():
            if node not in self.off and state.startswith(("down", "drain")):
                with contextlib.suppress(AssertionError):
                    self.cluster.client("scontrol", "update", f"nodename={node}", "state=resume")


def _name(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b"srun"


UP = ("idle", "mixed", "allocated")
Repair = Callable[[], None]
"""What puts the cluster right once the fault has done its work; None from a fault that found nothing to strike."""


def nothing() -> None:
    pass


def _signal_rank(target: Target, number: signal.Signals) -> Repair | None:
    pid = target.one_rank()
    if pid is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return nothing


def kill_rank(target: Target) -> Repair | None:
    return _signal_rank(target, signal.SIGKILL)


def hang_rank(target: Target) -> Repair | None:
    return _signal_rank(target, signal.SIGSTOP)


def kill_srun(target: Target) -> Repair | None:
    found = [pid for pid in target.processes("srun", "--job-name=train") if _name(pid).strip() == b"srun"]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return nothing if found else None


def power_off(target: Target) -> Repair | None:
    return _take_away(target, "kill-node", "start-node")


def cut_network(target: Target) -> Repair | None:
    """Until Slurm has given the node up: its ranks go on alone beside the next attempt."""
    return _take_away(target, "cut-node", "heal-node")


def _take_away(target: Target, fault: str, mend: str) -> Repair | None:
    node = target.one_node()
    if node is None:
        return None
    target.off.add(node)
    target.cluster.control(fault, node)

    def repair() -> None:
        target.cluster.control(mend, node)
        target.off.discard(node)

    return repair


def shake_network(target: Target) -> Repair | None:
    node = target.one_node()
    if node is None:
        return None
    target.cluster.control("cut-node", node)
    time.sleep(2)
    target.cluster.control("heal-node", node)
    return nothing


def restart_slurmd(target: Target) -> Repair | None:
    node = target.one_node()
    if node is None:
        return None
    target.cluster.control("kill-slurmd", node)
    time.sleep(1)
    target.cluster.control("start-slurmd", node)
    return nothing


def restart_controller(target: Target) -> Repair | None:
    target.cluster.control("stop-ctl")
    time.sleep(target.drawer.uniform(2, 8))
    target.cluster.control("start-ctl")
    return nothing


def lose_data_server(target: Target) -> Repair | None:
    target.server.stop()
    time.sleep(target.drawer.uniform(5, 25))
    target.server.start()
    return nothing


def _ask(target: Target, *command: str) -> Repair | None:
    """A request that Slurm refuses while the job waits in the queue."""
    if target.one_rank() is None:
        return None
    try:
        target.cluster.client(*command)
    except AssertionError:
        return None
    return nothing


def preempt(target: Target) -> Repair | None:
    return _ask(target, "scancel", "--batch", "--signal=USR1", target.job)


def signal_tasks(target: Target) -> Repair | None:
    return _ask(target, "scancel", "--signal=TERM", target.job)


def requeue_by_hand(target: Target) -> Repair | None:
    return _ask(target, "scontrol", "requeue", target.job)


def time_limit(target: Target) -> Repair | None:
    if _ask(target, "scontrol", "update", f"JobId={target.job}", "EndTime=now+80") is None:
        return None

    def repair() -> None:
        target.cluster.client("scontrol", "update", f"JobId={target.job}", "TimeLimit=60")

    return repair


KINDS: dict[str, Callable[[Target], Repair | None]] = {
    "rank killed": kill_rank,
    "rank stopped": hang_rank,
    "srun killed": kill_srun,
    "node powered off": power_off,
    "node cut off": cut_network,
    "network shaken": shake_network,
    "slurmd restarted": restart_slurmd,
    "controller restarted": restart_controller,
    "data server lost": lose_data_server,
    "preempted": preempt,
    "tasks signalled": signal_tasks,
    "requeued by hand": requeue_by_hand,
    "time limit": time_limit,
}
# These leave the attempt alone, so no new one is waited for.
HARMLESS = {"network shaken", "slurmd restarted", "controller restarted", "data server lost"}


def plan(faults: int, kinds: list[str], drawer: Random) -> list[str]:
    """`faults` kinds in random order, each about equally often."""
    rounds = [drawer.sample(kinds, len(kinds)) for _ in range(-(-faults // len(kinds)))]
    return [kind for chosen in rounds for kind in chosen][:faults]
