"""Continues prompts with a checkpoint: `python launch/generate.py --checkpoint RUN_OR_STEP_DIR --prompt TEXT`."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any, TypedDict

from stablelm.errors import ConfigError
from stablelm.json_text import parse
from stablelm.out_file import check_out, write_out
from stablelm.printable import printable
from stablelm.programs.arguments import (
    Parser,
    add_average,
    add_checkpoint,
    local_path,
    path_or_url,
    refuse_several_processes,
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Continues prompts with the model of a checkpoint. One text is printed while it is written.",
        epilog="Without --prompt and --prompts, standard input is the prompt. Exit codes: 0 done, 78 bad input.",
    )
    add_checkpoint(parser)
    add_average(parser)
    texts = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    texts.add_argument(
        "--prompts", type=local_path, metavar="FILE", help="a prompt a line; of *.jsonl, the key prompt of each line"
    )
    how = parser.add_argument_group("sampling")
    how.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    how.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: always the likeliest token; default: 1"
    )
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; default: all")
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest that together have P; default: 1"
    )
    how.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repetitions")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="another one, other texts; default: 0")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt; default: 1")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at once; default: 8")
    parser.add_argument("--out", type=local_path, metavar="FILE.jsonl", help="write one line for each text")
    parser.add_argument("--tokenizer", type=path_or_url, metavar="FILE", help="default: the run's own")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="import a method that the checkpoint names by import path"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp64"], help="default: the run's")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    return parser.parse_args(argv)


class PromptLine(TypedDict):
    """A line of a *.jsonl file of prompts; other keys are allowed."""

    prompt: str


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts that are asked for. Raises ConfigError."""
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompts is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("there is no prompt; give --prompt TEXT, --prompts FILE or text on standard input")
        try:
            return [sys.stdin.read().removesuffix("\n")]
        except UnicodeDecodeError:
            raise ConfigError("standard input is not UTF-8 text") from None
    path: Path = arguments.prompts
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}; name a readable file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path} is not UTF-8 text") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompts {path} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for _, line in numbered]
    return [_prompt(line, f"--prompts {path}:{number}") for number, line in numbered]


def _prompt(line: str, place: str) -> str:
    try:
        found: Any = parse(line, dict[str, Any])
        if not isinstance(found.get("prompt"), str):
            raise ValueError("it has no string under the key prompt")
    except ValueError as error:
        raise ConfigError(f'{place}: {error}; write lines such as {{"prompt": "Once upon a time"}}') from None
    return found["prompt"]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if code := refuse_several_processes("generate"):
        return code
    from stablelm.process_exit import exit_code_of

    return exit_code_of(lambda: _checked(arguments), lambda checked: _generate(arguments, *checked))


def _checked(arguments: argparse.Namespace) -> tuple[list[str], Any]:
    """The prompts and the `Sampling`; all that can be checked without torch is right."""
    from stablelm.evaluate.generation.sampling import Sampling, check_counts

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )
    check_counts(samples=arguments.samples, batch_size=arguments.batch_size)
    sampling.check_samples(arguments.samples)
    check_out(arguments.out)
    prompts = read_prompts(arguments)
    empty = [str(number) for number, prompt in enumerate(prompts, 1) if not prompt]
    if empty:
        raise ConfigError(f"prompt {', '.join(empty)} is empty; give it at least a word")
    return prompts, sampling


class _Shown:
    """Writes the only text to standard output as it grows, after its prompt."""

    def __init__(self, prompt: str):
        self._prompt = prompt

    def grown(self, index: int, text: str) -> None:
        """Called with each new part."""
        show(self._prompt + text, end="")
        self._prompt = ""

    def end(self) -> None:
        """No text follows."""
        show(self._prompt)


def show(text: str, end: str = "\n") -> None:
    """Prints text that a model wrote: a terminal gets no control characters but line breaks and tabs."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def _generate(arguments: argparse.Namespace, prompts: list[str], sampling: Any) -> None:
    from stablelm.evaluate.generation.generate import Watcher
    from stablelm.evaluate.generation.loaded_model import load_model, write

    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
    model = load_model(
        arguments.checkpoint,
        tokenizer=arguments.tokenizer,
        trust_checkpoint=arguments.trust_checkpoint,
        average=arguments.average,
        device=arguments.device,
        precision=arguments.precision,
    )
    alone = len(prompts) == 1 and arguments.samples == 1
    shown = _Shown(prompts[0]) if alone else None
    found = write(
        model,
        prompts,
        sampling,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        watcher=Watcher(grown=shown.grown) if shown is not None else None,
    )
    records = [_record(prompts, arguments.samples, index, each) for index, each in enumerate(found)]
    if shown is not None:
        shown.end()
    for record in records if shown is None else ():
        show(f"--- {record['prompt']!r}, sample {record['sample'] + 1}\n{record['prompt']}{record['text']}\n")
    if arguments.out is not None:
        write_out(arguments.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _record(prompts: list[str], samples: int, index: int, written: Any) -> dict[str, Any]:
    """What --out says of the text number `index`."""
    return {
        "prompt": prompts[index // samples],
        "sample": index % samples,
        "text": written.text,
        "new_tokens": len(written.tokens),
        "ended": written.ended,
    }
