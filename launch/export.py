"""Exports a checkpoint: `python launch/export.py --checkpoint RUN_OR_STEP_DIR --out DIR [--format auto]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.export import main

if __name__ == "__main__":
    sys.exit(main())
