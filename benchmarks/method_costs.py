"""What every method costs: time and memory of a training step beside those of pre_ln.

    python benchmarks/method_costs.py [--shape 24x512x2x512] [--only NAME,NAME] [--eager] [--rounds 20] [--group 5]
        [--runs DIR] [--out FILE.json]

A step is forward, backward, clipping, AdamW and what a method does after it, in bf16. Each method has its own norms,
activation and biases, and a process that compiles from an empty cache. Those of a group and pre_ln live beside one
another and take turns of one step, in an order that changes from round to round; ratios are of one round:

    step_ratio             seconds of a step, of pre_ln's
    training_memory_ratio  the most that the process held, less what it held once all was imported, of pre_ln's
    parameter_ratio        of pre_ln's

A finished group is kept in --runs: the same command continues where it was stopped. A method that has not the shape
(a width of its own) or is refused is left out, with the reason.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.goals import spread
from benchmarks.out_path import out_path
from benchmarks.train_step import say, shape_of
from benchmarks.training.contestants import METHOD
from benchmarks.training.live import Failed, Live, add_options, start
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS

BASE = "pre_ln"
Rounds = list[dict[str, Any]]


def chosen(only: str | None) -> list[str]:
    """The methods that are compared with BASE; ConfigError for a name that is none."""
    names = only.split(",") if only else list(METHODS)
    if wrong := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--only {wrong[0]} is no method; docs/methods/index.md lists them")
    return [name for name in names if name != BASE]


def groups_of(names: list[str], size: int) -> list[list[str]]:
    return [names[first : first + size] for first in range(0, len(names), size)]


def measure(names: list[str], folder: Path, options: argparse.Namespace) -> dict[str, Rounds]:
    """Rounds of BASE and of each method that could be started."""
    with ExitStack() as stack:
        live = {name: one for name in (BASE, *names) if (one := _started(name, folder, options, stack))}
        if BASE not in live:
            raise ConfigError(f"{BASE} could not be started at {options.shape}, so there is nothing to compare with")
        rounds: dict[str, Rounds] = {name: [] for name in live}
        for number in range(options.rounds):
            turn = number % len(live)
            for name in [*live][turn:] + [*live][:turn]:
                rounds[name].append(live[name].round())
    return rounds


def _started(name: str, folder: Path, options: argparse.Namespace, stack: ExitStack) -> Live | None:
    cache = folder.resolve() / "cache" / name
    try:
        return stack.enter_context(
            start(
                sys.executable,
                *(f"{METHOD}{name}", options.shape, options, cache),
                compiled=not options.eager,
                cold=True,
                matmuls=False,
            )
        )
    except Failed as reason:
        say(f"{name} is left out: {reason}")
        return None


def records_of(rounds: dict[str, Rounds], shape: str) -> Rounds:
    """Medians with quartiles of the ratios to BASE."""
    made = []
    for name, own in rounds.items():
        pairs = list(zip(own, rounds[BASE], strict=True))
        ratios = {
            "step_ratio": [base["tokens_per_second"] / each["tokens_per_second"] for each, base in pairs],
            "training_memory_ratio": [_training(each) / _training(base) for each, base in pairs],
            "parameter_ratio": [each["parameters"] / base["parameters"] for each, base in pairs],
        }
        for metric, values in ratios.items():
            found = dict(zip(("median", "low", "high"), spread(values), strict=True))
            made.append({"name": name, "shape": shape, "metric": metric, **found, "unit": f"of {BASE}"})
    return made


def _training(found: dict[str, Any]) -> float:
    return found["peak_memory_bytes"] - found["import_memory_bytes"]


def show(records: Rounds) -> None:
    print(f"{'':24}{'step':>24}{'memory':>9}{'parameters':>12}")
    for name in dict.fromkeys(each["name"] for each in records):
        step, memory, parameters = (each for each in records if each["name"] == name)
        shown = f"{step['median']:.3f} ({step['low']:.3f} to {step['high']:.3f})"
        print(f"{name:24}{shown:>24}{memory['median']:>9.2f}{parameters['median']:>12.2f}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_of, default=shape_of("24x512x2x512"))
    parser.add_argument("--only", metavar="NAME,NAME", help="methods; pre_ln is always among them")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--group", type=int, default=5, help="methods that live beside pre_ln: the memory must hold them"
    )
    add_options(parser, steps=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/method-costs"), help="where finished groups are kept")
    parser.add_argument("--out", type=out_path, metavar="FILE.json", help="write the records here")
    options = parser.parse_args(arguments)
    try:
        names = chosen(options.only)
        records: Rounds = []
        for group in groups_of(names, options.group):
            file = options.runs / f"{options.shape}-{'-'.join(group)}.json"
            if not file.exists():
                found = records_of(measure(group, options.runs, options), str(options.shape))
                file.write_text(json.dumps(found) + "\n")
                show(found)
            records += [each for each in json.loads(file.read_text()) if each["name"] != BASE]
    except (ConfigError, Failed) as error:
        print(error, file=sys.stderr)
        return 1
    show(records)
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
