"""Exports a checkpoint: `python launch/export.py --checkpoint RUN_OR_STEP_DIR --out DIR [--format auto]`."""

import argparse
import sys

from stablelm.errors import UserError
from stablelm.process_exit import report
from stablelm.programs.arguments import (
    Parser,
    add_average,
    add_checkpoint,
    local_path,
    path_or_url,
    refuse_several_processes,
)

FORMATS = ("auto", "llama", "qwen3", "gemma2", "gpt2", "hf", "gguf")
NORMS = ("own", "pre_rms", "crms")
DTYPES = ("bf16", "fp32", "q8_0")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Writes a trained model as a folder that transformers, vLLM or llama.cpp load.")
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="architecture; auto: the first of llama, qwen3, gemma2 and gpt2 that computes the model, else hf, our own "
        "modelling file; default: auto",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the weights; q8_0: GGUF only; default: bf16"
    )
    parser.add_argument(
        "--shard-gb", type=_gigabytes, default=5.0, metavar="GB", help="most of a file of weights; default: 5"
    )
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="own",
        help="of a model with layer norms in front of its sub-layers; pre_rms: root-mean-square norms, crms: these on "
        "a stream of one feature less, in format hf; both compute the same; default: own, as trained",
    )
    parser.add_argument("--tokenizer", type=path_or_url, metavar="PATH", help="default: the run's own")
    parser.add_argument(
        "--check-tokenizer",
        type=path_or_url,
        metavar="FILE",
        help="documents on which the exported tokenizer is compared; default: the run's validation text",
    )
    add_average(parser)
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload to this repository of the Hugging Face hub")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="import the method that the checkpoint names by import path"
    )
    return parser.parse_args(argv)


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.000001 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a size in gigabytes; write one such as 5 or 0.5")
    return value


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if code := refuse_several_processes("export"):
        return code
    from stablelm.export.writer import ExportRequest, export

    request = ExportRequest(
        checkpoint=arguments.checkpoint,
        out=arguments.out,
        format=arguments.format,
        dtype=arguments.dtype,
        shard_bytes=round(arguments.shard_gb * 1e9),
        tokenizer=arguments.tokenizer,
        checked=arguments.check_tokenizer,
        push=arguments.push,
        trusted=arguments.trust_checkpoint,
        average=arguments.average,
        norm=arguments.norm,
    )
    try:
        done = export(request)
    except UserError as error:
        report(error)
        return error.exit_code
    print(f"{done.folder}: format {done.format}, {done.parameters / 1e6:.2f} M parameters, {arguments.dtype}")
    for note in done.notes:
        print(note)
    return 0
