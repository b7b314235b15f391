"""Shows what a run would read: `python data/preview.py --config FILE [key.path=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.preview import main

if __name__ == "__main__":
    sys.exit(main())
