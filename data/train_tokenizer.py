"""Trains a tokenizer on any text: `python data/train_tokenizer.py --source ... --vocab-size N --out FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
