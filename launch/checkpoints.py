"""Lists, verifies or prunes the checkpoints of a run."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.errors import CheckpointError, ConfigError, UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="checkpoints.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "list": "one line a checkpoint, newest first; compares names and sizes",
        "verify": "reads and hashes every file",
        "prune": "deletes superseded checkpoints after hashing all; damaged ones are never deleted",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run, its checkpoints, or one step-...")
        if name == "prune":
            command.add_argument("--keep", type=int, metavar="N", help="newest ones kept; default: the run's own")
            command.add_argument("--keep-permanent-every", type=int, metavar="N", help="steps; default: the run's own")
            command.add_argument("--unfinished", action="store_true", help="also what dead attempts left half written")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return parser.parse_args(arguments)


def _steps(run_dir: Path) -> list[Path]:
    from stablelm.checkpoint import keep, manifest

    if manifest.step_of(run_dir) is not None and run_dir.is_dir():
        return [run_dir]
    root = keep.checkpoints_root(run_dir)
    steps = keep.step_directories(root)
    if not steps:
        raise CheckpointError(f"{root} holds no checkpoint: name the directory of a run that has saved one")
    return steps


def show(run_dir: Path) -> None:
    from stablelm.checkpoint import manifest

    print(f"{'checkpoint':<16} {'MiB':>10}  {'committed (UTC)':<19}  attempt")
    for path in _steps(run_dir):
        problems = manifest.verify(path, hashes=False)
        if problems:
            print(f"{path.name:<16} damaged: {'; '.join(problems)}")
            continue
        commit = manifest.read_commit(path)
        size = sum(record.size for record in manifest.read_manifest(path, commit).values())
        print(f"{path.name:<16} {size / 2**20:>10.1f}  {commit.time[:19]:<19}  {commit.attempt}")


def check(run_dir: Path) -> None:
    from stablelm.checkpoint import manifest

    damaged = []
    for path in _steps(run_dir):
        problems = manifest.verify(path)
        damaged += [path.name] if problems else []
        print(f"{path.name:<16} {'damaged: ' + '; '.join(problems) if problems else 'whole'}", flush=True)
    if damaged:
        raise CheckpointError(f"damaged checkpoints in {run_dir}: {', '.join(damaged)}; resume skips them")


def prune(options: argparse.Namespace) -> None:
    from stablelm.checkpoint import keep

    root = keep.checkpoints_root(options.run_dir)
    kept, permanent = _retention(options)
    if kept < 1:
        raise ConfigError(f"--keep {kept} would delete every checkpoint: give at least 1")
    if options.dry_run:
        for path in keep.superseded(root, kept, permanent, hashes=True):
            print(f"would delete {path}")
        return
    gone = keep.retain(root, kept, permanent, hashes=True)
    gone += keep.clean_staging(root) if options.unfinished else []
    for path in gone:
        print(f"deleted {path}")


def _retention(options: argparse.Namespace) -> tuple[int, int | None]:
    """Retention from the arguments, else from the run's configuration."""
    import yaml

    path = options.run_dir / "config.yaml"
    section = (yaml.safe_load(path.read_text()) or {}).get("checkpoint", {}) if path.is_file() else {}
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
        else:
            prune(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
