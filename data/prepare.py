"""Tokenizes text into shards, once for many runs: `python data/prepare.py --source ... --tokenizer ... --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.prepare import main

if __name__ == "__main__":
    sys.exit(main())
