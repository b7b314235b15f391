"""Evaluates a checkpoint: `python launch/eval.py --checkpoint RUN_OR_STEP_DIR [--data PATH] [--tasks TASK,...]`."""

import argparse
import sys

from stablelm.errors import ConfigError
from stablelm.process_exit import report
from stablelm.programs.arguments import Parser, add_average, add_checkpoint, named_path, named_paths, path_or_url

READING = ("text_column", "text_unit", "bad_rows")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Loss, perplexity and bits per byte of a checkpoint on any text, and its accuracy in tasks."
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=named_path,
        metavar="[NAME=]PATH",
        help="file, glob, folder or URL of documents; may be repeated; default: the run's validation sets",
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="key or column that holds the text; default: as the run has it"
    )
    parser.add_argument("--text-unit", choices=["file", "line"], help="a document in *.txt files; default: as the run")
    parser.add_argument("--bad-rows", choices=["stop", "skip"], help="a row without a document; default: as the run")
    parser.add_argument("--tokenizer", type=path_or_url, metavar="PATH", help="default: the run's own")
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="at most N sequences per set, 0 for all; default: as many as training used",
    )
    add_average(parser)
    add_task_arguments(parser)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        type=path_or_url,
        metavar="FILE",
        help="your own configuration, whose keys win but for the model's: what a checkpoint's asks for beyond reading "
        "plain files of this machine is done only where this one, --data or --trust-checkpoint says so",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="use the checkpoint's whole configuration, its functions by import path and its URLs included; says which",
    )
    parser.add_argument("--out", type=path_or_url, metavar="FILE.json", help="write the figures as JSON")
    return parser.parse_args(argv)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        action="append",
        default=[],
        type=named_paths,
        metavar="TASK,...",
        help="[NAME=]FILE.jsonl of multiple-choice items (query, choices, gold), or names and yaml files of tasks of "
        "lm-evaluation-harness; without --data no text is scored then",
    )
    group.add_argument(
        "--task-path", type=path_or_url, metavar="FOLDER", help="more definitions of lm-evaluation-harness's tasks"
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N items of each task; default: all")
    group.add_argument(
        "--few-shot", type=int, metavar="N", help="solved examples before each item; default: the task's"
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences at once; default: the run's evaluate.micro_batch_size"
    )


def task_options(arguments: argparse.Namespace):
    """What `add_task_arguments` asks for, None without a task."""
    from stablelm.evaluate.tasks.task_evaluation import TaskOptions

    if arguments.tasks:
        return TaskOptions(
            arguments.tasks, arguments.task_path, arguments.limit, arguments.few_shot, arguments.batch_size
        )
    for name in ("task_path", "limit", "few_shot", "batch_size"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for tasks; name them by --tasks")
    return None


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        tasks = task_options(arguments)
    except ConfigError as error:
        report(error)
        return error.exit_code
    from stablelm.evaluate.checkpoint_evaluation import evaluate_checkpoint

    return evaluate_checkpoint(
        arguments.checkpoint,
        data=arguments.data,
        tokenizer=arguments.tokenizer,
        sequences=arguments.sequences,
        out=arguments.out,
        reading={name: value for name in READING if (value := getattr(arguments, name)) is not None},
        config=arguments.config,
        trusted=arguments.trust_checkpoint,
        tasks=tasks,
        average=arguments.average,
    )
