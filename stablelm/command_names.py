"""What a user types to start a program of ours: `stablelm eval`, or in a checkout `python launch/eval.py`."""

import sys
from pathlib import Path

_SCRIPTS = {
    "import": "launch/import_model.py",
    "prepare": "data/prepare.py",
    "preview": "data/preview.py",
    "train-tokenizer": "data/train_tokenizer.py",
}


def typed(command: str) -> str:
    """The way to start `command` (its name after `stablelm`) that goes with the way this process was started."""
    if Path(sys.argv[0]).parent.name in ("launch", "data"):
        return f"python {_SCRIPTS.get(command, f'launch/{command}.py')}"
    return f"stablelm {command}"
