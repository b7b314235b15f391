"""A run that is killed with all its processes as soon as a checkpoint is committed."""

import time
from pathlib import Path

from support.forked import start_ranks
from support.programs import LAUNCH, environment, free_port

SLOW = ("faults.allow=true", "faults.slow=[0,0.4]")  # so that the kill comes before the run is over


def kill_after_save(line: list[str], run_dir: Path, step: int, *, processes: int = 1, patience: float = 240) -> str:
    """Starts `launch/pretrain.py` and kills it; '' if it was killed after its save of `step`, else what it said."""
    output = run_dir.with_name(f"{run_dir.name}-output-{step}")
    output.mkdir(parents=True)
    script, arguments = str(LAUNCH / "pretrain.py"), [*line, *SLOW, f"run.dir={run_dir}"]
    ranks = start_ranks(script, arguments, environment(), processes=processes, port=free_port(), output=output)
    committed = run_dir / "checkpoints" / f"step-{step:08d}" / "COMMITTED"
    deadline = time.monotonic() + patience
    try:
        while not committed.exists() and time.monotonic() < deadline and any(r.exitcode is None for r in ranks):
            time.sleep(0.01)
        alive = all(rank.exitcode is None for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if committed.exists() and alive:
        return ""
    return " ".join((output / "err").read_text().split())[-600:] or "it was over, or took too long"
