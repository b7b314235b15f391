"""Punishes one run on the test cluster until many faults have struck, then compares it with an undisturbed one.

    tests/slurm/soak.sh --faults 30 --seed 1 --out docs/soak.md
    tests/slurm/soak.sh --faults 2 --kinds "rank killed,node powered off"

Needs root, namespaces and Slurm (tests/slurm/cluster install). Ends with 1 where the run did not finish by itself, a
planned fault did not strike, a loss differs in any bit, a token was lost or repeated, a step was committed twice or by
an attempt that a newer one had replaced, or more than one checkpoint interval was made again after a fault.
"""

import argparse
import json
import random
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support import programs, soak_report
from support.programs import TINY, losses
from support.punisher import DATA_HOST, DATA_PORT, KINDS, DataServer, Target, plan
from support.slurm import PACE, Cluster, cluster, missing
from support.soaking import EVERY, FAST, Soak, punish
from support.tiny import TinyCorpus, make_tiny_corpus

STEPS_A_FAULT = 40
NODES, RANKS = 4, 4


def settings(corpus: TinyCorpus, run_dir: Path, steps: int, *more: str) -> list[str]:
    return [
        *TINY, *corpus.overrides(), f"train.steps={steps}", f"checkpoint.every={EVERY}", "checkpoint.keep=100000",
        "engine.kind=ddp", f"run.dir={run_dir}", *more,
    ]  # fmt: skip


def submit(cluster: Cluster, corpus: TinyCorpus, folder: Path, steps: int, background: bool) -> str:
    config, files = folder / "empty.yaml", "tiny-train.{00000..00003}-of-00004.json.gz"
    config.write_text("{}\n")
    more = [
        f"data.path=http://{DATA_HOST}:{DATA_PORT}/train/{files}", "data.retry_budget=20", "observe.hang_seconds=40",
        "observe.first_step_seconds=120", f"checkpoint.async={str(background).lower()}",
    ]  # fmt: skip
    return cluster.submit(
        "-N2", "--ntasks-per-node=2", "--time=60", f"--output={folder}/job.out", "slurm/pretrain.sh", str(config),
        *settings(corpus, folder / "run", steps, *more), PYTHONPATH=str(PACE), PACE_SECONDS=str(folder / "pace"),
        STABLELM_BACKOFF_SECONDS="5",
    )  # fmt: skip


def undisturbed(corpus: TinyCorpus, folder: Path, steps: int) -> dict[int, float]:
    """Losses of the same run without Slurm, a data server, faults or slowing down."""
    begun = time.monotonic()
    print(f"undisturbed run of {steps} steps on {RANKS} processes", flush=True)
    arguments = settings(corpus, folder / "undisturbed", steps)
    done = programs.run("pretrain", *arguments, processes=RANKS, timeout=3600)
    assert done.returncode == 0, done.stderr
    print(f"made in {time.monotonic() - begun:.0f} s", flush=True)
    return losses(folder / "undisturbed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="soak.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"separated by commas; default: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="no fault strikes after so long")
    parser.add_argument(
        "--background",
        action="store_true",
        help="save in the background, as runs do by default: a fault may then also cost the save in flight",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the report")
    parser.add_argument("--folder", type=Path, help="keep the run here, a new folder; default: a temporary one")
    options = parser.parse_args()
    options.kinds = [kind.strip() for kind in options.kinds.split(",")]
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return options


def main() -> int:
    options = parse()
    if missing():
        print(f"cannot soak here: {missing()}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cluster is to end with us
    drawer = random.Random(options.seed)
    planned = plan(options.faults, options.kinds, drawer)
    steps = STEPS_A_FAULT * len(planned)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak."))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(planned)} faults, seed {options.seed}; everything is kept in {folder}", flush=True)
    corpus = make_tiny_corpus(folder / "corpus")
    expected = undisturbed(corpus, folder, steps)
    (folder / "pace").write_text(FAST)
    with cluster(NODES, STC_CPUS="4", STC_SLURMD_TIMEOUT="10", STC_MESSAGE_TIMEOUT="10") as started:
        server = DataServer(started, corpus.folder, folder / "server.log")
        try:
            time.sleep(2)
            job = submit(started, corpus, folder, steps, options.background)
            target = Target(started, job, server, drawer)
            soak = Soak(target, folder / "run", folder / "pace", steps, planned)
            punish(soak, options.minutes * 60)
            wrong = soak_report.problems(soak, expected, background=options.background)
            command = "tests/slurm/soak.sh " + shlex.join(sys.argv[1:])
            text = soak_report.page(soak, command, options.seed, wrong)
        finally:
            server.stop()
    print(text)
    if options.out:
        options.out.write_text(text)
    (folder / "strikes.json").write_text(json.dumps([asdict(one) for one in soak.strikes], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
