"""The console command: `stablelm COMMAND ...`, and `python -m stablelm COMMAND ...` where launchers want a module."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from stablelm import __version__
from stablelm.programs.arguments import Parser

COMMANDS = {
    "pretrain": ("pretrain", "trains a model, or resumes a run"),
    "node": ("node", "this host's share of a run: starts its ranks by torchrun and passes signals on"),
    "eval": ("eval", "loss, perplexity, bits per byte and tasks of a checkpoint"),
    "probe": ("probe", "signal and gradient of every layer at initialisation, predicted and measured"),
    "plan": ("plan", "memory, collectives and step time on any accelerators, without one"),
    "study": ("study", "trains what a study file compares, and reports on it"),
    "advise": ("advise", "a method's learning rate at a size, from recorded studies"),
    "export": ("export", "a checkpoint for transformers, vLLM or llama.cpp"),
    "import": ("import_model", "a model of another program as a run"),
    "report": ("report", "one HTML page of a run"),
    "generate": ("generate", "continues prompts"),
    "checkpoints": ("checkpoints", "lists, verifies, prunes or consolidates a run's checkpoints"),
    "prepare": ("prepare", "tokenizes text into shards"),
    "preview": ("preview", "shows the text that a run would read"),
    "train-tokenizer": ("train_tokenizer", "trains a tokenizer"),
    "lm-harness": ("lm_harness", "lm-evaluation-harness's own command, with runs as models"),
}
"""Name -> module in this package, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the first argument names on the others; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    started = "python -m stablelm" if Path(sys.argv[0]).name == "__main__.py" else "stablelm"
    name = _parser(started).parse_args(argv[:1]).command
    # The program's usage and messages then name the command that was typed.
    sys.argv = [f"{started} {name}", *argv[1:]]
    return import_module(f"stablelm.programs.{COMMANDS[name][0]}").main(argv[1:])


def _parser(started: str) -> Parser:
    listed = "\n".join(f"  {name:<16} {words}" for name, (_, words) in COMMANDS.items())
    parser = Parser(
        prog=started,
        usage="%(prog)s COMMAND ...",
        description="Distributed pretraining of very deep language models.",
        epilog=f"commands:\n{listed}\n\n'%(prog)s COMMAND --help' has the arguments of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
