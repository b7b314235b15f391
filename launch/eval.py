"""Evaluates a checkpoint: `python launch/eval.py --checkpoint RUN_OR_STEP_DIR [--data PATH] [--tasks TASK,...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.eval import main

if __name__ == "__main__":
    sys.exit(main())
