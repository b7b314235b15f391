"""lm-evaluation-harness's own command, with runs as models: `python launch/lm_harness.py run --model stablelm ...`.

The harness finds models by name in its own table alone, so the name `stablelm` is put there before it starts.
"""

import importlib.util
import os
import sys

from stablelm.errors import ConfigError, UserError
from stablelm.process_exit import end_at_once, report


def main(argv: list[str] | None = None) -> int:
    """Arguments are the harness's; `--model_args checkpoint=RUN_OR_STEP_DIR`. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if importlib.util.find_spec("lm_eval") is None:
        report(ConfigError("this command is lm-evaluation-harness's: pip install 'stablelm[eval]'"), rank)
        return ConfigError.exit_code
    from lm_eval.__main__ import cli_evaluate

    import stablelm.evaluate.tasks.harness  # noqa: F401 - registers the model

    sys.argv = [sys.argv[0], *argv]
    try:
        cli_evaluate()
    except UserError as error:
        report(error, rank)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            end_at_once(error.exit_code)
        return error.exit_code
    return 0
