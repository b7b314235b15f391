"""One task per node, before the ranks start: is this node, its GPUs and its network fit for the run?

`preflight.py RUN_DIR NOW` prints a line for what is wrong and ends with 1 if the ranks could not start or would die
here; `NOW` is the batch host's clock. Standard library only: it must answer in a second.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.arguments import Parser, local_path

MEET_SECONDS = 30.0
SKEW_SECONDS = 20.0
LEAST_DISK_BYTES = 1 << 30
LEAST_SHARED_BYTES = 64 << 20


class Findings:
    """What was found on this node; errors end the attempt, warnings are only printed."""

    def __init__(self) -> None:
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.failed = False

    def error(self, words: str) -> None:
        self.failed = True
        self._say("error: " + words)

    def warning(self, words: str) -> None:
        self._say("warning: " + words)

    def _say(self, words: str) -> None:
        print(f"pre-flight: {self.node}: {words}", flush=True)


def check_node(run_dir: Path, now: float, found: Findings) -> None:
    """Shared run directory, room, clock."""
    try:
        mark = run_dir / "slurm" / f".seen-by-{found.node}"
        if not mark.parent.is_dir():
            return found.error(f"{run_dir} is not seen here: run.dir must lie on a file system that all nodes share")
        mark.touch()
        mark.unlink(missing_ok=True)  # another task of this node may have been here
        if shutil.disk_usage(run_dir).free < LEAST_DISK_BYTES:
            found.warning(f"less than 1 GiB is free for {run_dir}")
    except OSError as error:
        found.error(f"{run_dir} cannot be written ({error.strerror})")
    if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free < LEAST_SHARED_BYTES:
        found.warning("less than 64 MiB of shared memory is free in /dev/shm, which NCCL needs")
    if abs(time.time() - now) > SKEW_SECONDS:
        found.warning(f"its clock differs by {time.time() - now:+.0f} s from the batch host's: time limits go by it")


def check_gpus(found: Findings, environ=os.environ) -> None:
    """As many GPUs as Slurm gave, healthy and free; nothing where the job asked for none."""
    wanted = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    if not wanted or shutil.which("nvidia-smi") is None:
        return
    fields = "index,memory.used,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return found.error(f"nvidia-smi fails ({str(error)[:80]}): a GPU has fallen off the bus or its driver hangs")
    gpus = [[field.strip() for field in line.split(",")] for line in told.splitlines() if line.strip()]
    if len(gpus) < wanted:
        found.error(f"nvidia-smi shows {len(gpus)} of {wanted} GPUs")
    # Only a whole node is surely ours: elsewhere nvidia-smi may show GPUs of other jobs.
    for index, used, broken in gpus if len(gpus) == wanted else []:
        if broken.isdigit() and int(broken) > 0:
            found.error(f"GPU {index} has {broken} uncorrected memory errors since it was reset")
        if used.isdigit() and int(used) > 2048:
            found.warning(f"{used} MiB of GPU {index} are taken before the run starts: another process lives there")


def check_network(found: Findings, environ=os.environ) -> None:
    """Every node reaches the head by the name and port that the ranks will use, and knows itself by a true address."""
    nodes, rank = int(environ.get("SLURM_STEP_NUM_NODES", "1")), int(environ.get("SLURM_PROCID", "0"))
    if nodes < 2:
        return
    if "GLOO_SOCKET_IFNAME" not in environ and _own_address().startswith("127."):
        found.error(
            "its own name means 127.x here, so gloo would offer the others an address they cannot reach: "
            "set STABLELM_INTERFACE in slurm/site.sh to the interface between the nodes (ip -br address)"
        )
    head, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    try:
        if rank == 0:
            missing = await_nodes(head, port, nodes - 1)
            if missing:
                found.error(f"{missing} of {nodes} nodes did not reach {head}:{port} within {MEET_SECONDS:.0f} s")
        elif not reach(head, port):
            found.error(f"cannot reach {head}:{port}: a firewall, or the name means another address here")
    except OSError as error:
        found.error(f"cannot listen on {head}:{port} ({error.strerror})")


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def await_nodes(head: str, port: int, count: int, seconds: float = MEET_SECONDS) -> int:
    """Listens as the run's first rank will; returns how many of `count` nodes did not come."""
    end = time.monotonic() + seconds
    family = socket.getaddrinfo(head, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server(("", port), family=family) as server:
        while count and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                server.accept()[0].close()
            except TimeoutError:
                break
            count -= 1
    return count


def reach(head: str, port: int, seconds: float = MEET_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((head, port), timeout=5).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="preflight.py", description=__doc__)
    parser.add_argument("run_dir", type=local_path)
    parser.add_argument("now", type=float)
    options, found = parser.parse_args(argv), Findings()
    check_node(options.run_dir, options.now, found)
    check_gpus(found)
    check_network(found)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
