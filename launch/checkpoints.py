"""Lists, verifies, prunes or consolidates the checkpoints of a run."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.arguments import Parser, local_path, path_or_url
from stablelm.errors import CheckpointError, ConfigError, UserError
from stablelm.printable import printable


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="checkpoints.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    where = "a run, its checkpoints, or one step-...; a path or URL"
    for name, text in {
        "list": "one line a checkpoint, newest first; compares names and sizes",
        "verify": "reads and hashes every file",
        "prune": "deletes superseded checkpoints after hashing all; damaged ones are never deleted",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run_dir", type=path_or_url, metavar="RUN_DIR", help=where)
        if name == "prune":
            command.add_argument("--keep", type=int, metavar="N", help="newest ones kept; default: the run's own")
            command.add_argument("--keep-permanent-every", type=int, metavar="N", help="steps; default: the run's own")
            command.add_argument("--unfinished", action="store_true", help="also what dead attempts left half written")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    text = "writes the weights of a checkpoint, verified, to one safetensors file"
    command = commands.add_parser("consolidate", help=text, description=text)
    command.add_argument("run_dir", type=path_or_url, metavar="RUN_DIR", help=where)
    command.add_argument("--out", metavar="FILE.safetensors", type=local_path, required=True, help="must not exist yet")
    return parser.parse_args(arguments)


def _steps(run_dir: str) -> list:
    from stablelm.checkpoint import keep
    from stablelm.checkpoint.places import place

    one = keep.step_directory(place(run_dir))
    if one is not None:
        return [one]
    root = keep.checkpoints_root(place(run_dir))
    steps = keep.step_directories(root)
    if not steps:
        raise CheckpointError(f"{root} holds no checkpoint: name the directory of a run that has saved one")
    return steps


def show(run_dir: str) -> None:
    from stablelm.checkpoint import manifest

    print(f"{'checkpoint':<16} {'MiB':>10}  {'committed (UTC)':<19}  {'token':>5}  attempt")
    for path in _steps(run_dir):
        problems = manifest.verify(path, hashes=False)
        if problems:
            print(printable(f"{_name(path):<16} damaged: {'; '.join(problems)}"))
            continue
        commit = manifest.read_commit(path)
        size = sum(record.size for record in manifest.read_manifest(path, commit).values())
        time, size = commit.time[:19], size / 2**20
        print(printable(f"{_name(path):<16} {size:>10.1f}  {time:<19}  {commit.token:>5}  {commit.attempt}"))


def _name(path) -> str:
    from stablelm.checkpoint import manifest

    return manifest.step_name(manifest.step_of(path) or 0)


def check(run_dir: str) -> None:
    from stablelm.checkpoint import contents, manifest

    damaged = []
    for path in _steps(run_dir):
        problems = manifest.verify(path) or contents.problems(path)
        damaged += [_name(path)] if problems else []
        print(f"{_name(path):<16} {printable('damaged: ' + '; '.join(problems)) if problems else 'whole'}", flush=True)
    if damaged:
        raise CheckpointError(f"damaged checkpoints in {run_dir}: {', '.join(damaged)}; resume skips them")


def prune(options: argparse.Namespace) -> None:
    from stablelm.checkpoint import fence, keep
    from stablelm.checkpoint.places import place

    root = keep.checkpoints_root(place(options.run_dir))
    kept, permanent = _retention(options)
    if kept < 1:
        raise ConfigError(f"--keep {kept} would delete every checkpoint: give at least 1")
    if options.dry_run:
        for path in keep.superseded(root, kept, permanent, hashes=True):
            print(f"would delete {path}")
        return
    gone = keep.retain(root, kept, permanent, hashes=True)
    gone += fence.sweep(root, sys.maxsize) if options.unfinished else []
    for path in gone:
        print(f"deleted {path}")


def _retention(options: argparse.Namespace) -> tuple[int, int | None]:
    """Retention from the arguments, else from the run's configuration."""
    import yaml

    from stablelm.checkpoint.places import place

    path = place(options.run_dir) / "config.yaml"
    section = (yaml.safe_load(path.read_bytes()) or {}).get("checkpoint", {}) if path.is_file() else {}
    kept = options.keep if options.keep is not None else section.get("keep")
    if kept is None:
        raise ConfigError(f"{options.run_dir} has no config.yaml that says checkpoint.keep: give --keep N")
    permanent = options.keep_permanent_every
    return kept, permanent if permanent is not None else section.get("keep_permanent_every")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "list":
            show(options.run_dir)
        elif options.command == "verify":
            check(options.run_dir)
        elif options.command == "prune":
            prune(options)
        else:
            from stablelm.checkpoint.consolidate import consolidate

            print(consolidate(options.run_dir, options.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
