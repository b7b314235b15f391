"""A model of another program as a run: `python launch/import_model.py --from FOLDER --out DIR [key.path=value ...]`."""

import argparse
import sys

from stablelm.command_names import typed
from stablelm.errors import UserError
from stablelm.process_exit import report
from stablelm.programs.arguments import Parser, path_or_url, refuse_several_processes


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Makes a run directory of a model in the format of transformers (llama, mistral, qwen2, qwen3, "
        "gpt2; config.json and safetensors files): to train on from its weights, evaluate, generate and export.",
        epilog="Page: docs/importing.md. Exit codes: 0 done, 74 the directory cannot be written, 78 bad input.",
    )
    parser.add_argument("--from", dest="source", required=True, type=path_or_url, metavar="FOLDER", help="the model")
    parser.add_argument("--out", required=True, type=path_or_url, metavar="DIR", help="the new run directory")
    parser.add_argument(
        "--method",
        default="pre_ln",
        metavar="NAME",
        help="what it is trained on as; its scales are divided out of the weights, so that the function stays the "
        "same; default: pre_ln",
    )
    parser.add_argument(
        "--tokenizer", type=path_or_url, metavar="PATH", help="default: the one in the folder of the model"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="keys of the run's configuration that the model leaves open",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if code := refuse_several_processes("import"):
        return code
    from stablelm.export.importing.import_model import import_model

    try:
        made = import_model(
            arguments.source,
            arguments.out,
            method=arguments.method,
            tokenizer=arguments.tokenizer,
            overrides=arguments.overrides,
        )
    except UserError as error:
        report(error)
        return error.exit_code
    model = made.config.model
    print(
        f"{made.path}: {made.architecture}, {model.n_layers} layers x {model.d_model}, "
        f"{made.parameters / 1e6:.2f} M parameters, as {model.method}"
    )
    if made.added:
        print(f"{len(made.added)} biases that the source lacks start at zero and are trained, such as {made.added[0]}")
    keys = "run.dir=... data.path=... train.steps=..."
    print(f"train on: {typed('pretrain')} --config {made.path}/config.yaml {keys}")
    return 0
