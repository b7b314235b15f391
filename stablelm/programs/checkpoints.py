"""Lists, verifies, prunes or consolidates the checkpoints of a run."""

import argparse
import os
import sys

from stablelm.errors import CheckpointError, ConfigError, UserError
from stablelm.printable import printable
from stablelm.programs.arguments import Parser, local_path, path_or_url


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    where = "a run, its checkpoints, or one step-...; a path or URL; nothing outside it is touched"
    elsewhere = "where the run has its checkpoints, if not in RUN_DIR"
    for name, text in {
        "list": "one line per checkpoint, newest first; compares names and sizes",
        "verify": "reads and hashes every file",
        "prune": "deletes superseded checkpoints after hashing all; corrupt ones are never deleted",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run_dir", type=path_or_url, metavar="RUN_DIR", help=where)
        command.add_argument("--dir", type=path_or_url, metavar="DIR", help=elsewhere)
        if name == "verify":
            command.add_argument(
                "--trust-checkpoint",
                action="store_true",
                help="import the method that the checkpoint names, if it is code",
            )
        if name == "prune":
            command.add_argument("--keep", type=int, metavar="N", help="newest ones kept; default: the run's own")
            command.add_argument("--keep-permanent-every", type=int, metavar="N", help="steps; default: the run's own")
            command.add_argument("--keep-best", metavar="METRIC", help="also the best one; default: the run's own")
            command.add_argument(
                "--unfinished", action="store_true", help="also incomplete saves of attempts that have ended"
            )
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    text = "writes the weights of a checkpoint, verified, to one safetensors file"
    command = commands.add_parser("consolidate", help=text, description=text)
    command.add_argument("run_dir", type=path_or_url, metavar="RUN_DIR", help=where)
    command.add_argument("--dir", type=path_or_url, metavar="DIR", help=elsewhere)
    command.add_argument("--out", metavar="FILE.safetensors", type=local_path, required=True, help="must not exist yet")
    return parser.parse_args(arguments)


def _root(options: argparse.Namespace):
    """The directory of the checkpoints: in what was given, or as --dir says."""
    from stablelm.checkpoint import selection
    from stablelm.checkpoint.remote_path import checkpoint_path

    if options.dir is None:
        return selection.checkpoints_root(checkpoint_path(options.run_dir))
    root = checkpoint_path(options.dir)
    if not root.is_dir():
        raise CheckpointError(f"--dir {root} is not a directory: name the one that holds the step-... directories")
    return root


def _steps(options: argparse.Namespace) -> list:
    from stablelm.checkpoint import selection
    from stablelm.checkpoint.remote_path import checkpoint_path

    one = selection.step_directory(checkpoint_path(options.run_dir))
    if one is not None and options.dir is None:
        return [one]
    root = _root(options)
    steps = selection.step_directories(root)
    if not steps:
        raise selection.no_checkpoint(root, checkpoint_path(options.run_dir))
    return steps


def show(options: argparse.Namespace) -> None:
    from stablelm.checkpoint import manifest

    best, metric = _best(options)
    print(f"{'checkpoint':<16} {'MiB':>10}  {'committed (UTC)':<19}  {'token':>5}  attempt")
    for path in _steps(options):
        problems = manifest.verify(path, hashes=False)
        if problems:
            print(printable(f"{_name(path):<16} corrupt: {'; '.join(problems)}"))
            continue
        commit = manifest.read_commit(path)
        size = sum(record.size for record in manifest.read_manifest(path, commit).values())
        time, size = commit.time[:19], size / 2**20
        mark = f"  {metric}" if path == best else ""
        print(printable(f"{_name(path):<16} {size:>10.1f}  {time:<19}  {commit.token:>5}  {commit.attempt}{mark}"))


def _best(options: argparse.Namespace) -> tuple:
    """The best checkpoint, and its metric in words; (None, "") where the run does not ask for one."""
    from stablelm.checkpoint import best, manifest, selection
    from stablelm.checkpoint.remote_path import checkpoint_path

    if options.dir is None and selection.step_directory(checkpoint_path(options.run_dir)) is not None:
        return None, ""  # one step alone
    steps = _steps(options)
    metric = next(filter(None, map(best.metric_of, steps)), None)
    if metric is None or not (found := best.ranked(steps, metric)):
        return None, ""
    value = best.evaluations_of(steps)[manifest.step_of(found[0]) or 0][metric]
    return found[0], f"best {metric}={value:.6g}"


def _name(path) -> str:
    from stablelm.checkpoint import manifest

    return manifest.step_name(manifest.step_of(path) or 0)


def check(options: argparse.Namespace) -> None:
    from stablelm.checkpoint import contents, manifest, selection

    corrupt = []
    for path in _steps(options):
        weights_alone = (path.parent.parent / selection.IMPORTED).exists() and not manifest.step_of(path)
        try:
            problems = manifest.verify(path) or contents.problems(
                path, optimizer=not weights_alone, trusted=options.trust_checkpoint
            )
        except CheckpointError as error:  # of an earlier version
            problems = [str(error)]
        corrupt += [_name(path)] if problems else []
        intact = "OK (weights of an imported model)" if weights_alone else "OK"
        print(f"{_name(path):<16} {printable('corrupt: ' + '; '.join(problems)) if problems else intact}", flush=True)
    if corrupt:
        raise CheckpointError(f"corrupt checkpoints in {options.run_dir}: {', '.join(corrupt)}; resume skips them")


def prune(options: argparse.Namespace) -> None:
    from stablelm.checkpoint import fence, retention, selection
    from stablelm.checkpoint.remote_path import checkpoint_path

    root = _root(options)
    if not selection.step_directories(root) and not options.unfinished:
        raise selection.no_checkpoint(root, checkpoint_path(options.run_dir))
    kept, permanent, best = _retention(options)
    if kept < 1:
        raise ConfigError(f"--keep {kept} would delete every checkpoint: give at least 1")
    if options.keep_best is not None:
        _check_metric(options.keep_best, selection.step_directories(root))
    if options.dry_run:
        for path in retention.superseded(root, kept, permanent, best=best, hashes=True):
            print(f"would delete {path}")
        return
    deleted = retention.retain(root, kept, permanent, best=best, hashes=True)
    deleted += fence.sweep(root, sys.maxsize) if options.unfinished else []
    for path in deleted:
        print(f"deleted {path}")


def _check_metric(metric: str, steps: list) -> None:
    from stablelm.checkpoint import best

    known = sorted({name for metrics in best.evaluations_of(steps).values() for name in metrics})
    if metric not in known:
        has = f"they have {', '.join(known)}" if known else "they have none, so leave it out"
        raise ConfigError(f"--keep-best {metric} is not a metric of these checkpoints; {has}")


def _retention(options: argparse.Namespace) -> tuple[int, int | None, str | None]:
    """Retention from the arguments, else from the run's configuration, which holds for its own checkpoints alone."""
    config = _configured(options.run_dir)
    section = config and config.checkpoint
    if section is not None and options.dir is not None:
        from stablelm.checkpoint.remote_path import checkpoint_path

        asked = checkpoint_path(os.path.expanduser(section.dir)) if section.dir else None
        section = section if asked == checkpoint_path(options.dir) else None
    kept = options.keep if options.keep is not None else section and section.keep
    if kept is None:
        raise ConfigError(f"{options.run_dir} has no config.yaml that says checkpoint.keep for them: give --keep N")
    permanent = options.keep_permanent_every
    best = options.keep_best or (config.evaluate.best if config is not None and section is not None else None)
    return kept, permanent if permanent is not None else section and section.keep_permanent_every, best


def _configured(run_dir: str):
    """A run's config.yaml, None where it has none. Raises ConfigError."""
    from stablelm.checkpoint.remote_path import checkpoint_path
    from stablelm.config.load import loads
    from stablelm.small_files import read_small

    path = checkpoint_path(run_dir) / "config.yaml"
    if not path.is_file():
        return None
    try:
        return loads(read_small(path).decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give --keep N") from None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "list":
            show(options)
        elif options.command == "verify":
            check(options)
        elif options.command == "prune":
            prune(options)
        else:
            from stablelm.checkpoint.reader import consolidate

            print(consolidate(options.run_dir, options.out, elsewhere=options.dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
