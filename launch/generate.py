"""Continues prompts with a checkpoint: `python launch/generate.py --checkpoint RUN_OR_STEP_DIR --prompt TEXT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.generate import main

if __name__ == "__main__":
    sys.exit(main())
