"""Trains a model: `python launch/pretrain.py --config FILE [key.path=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
