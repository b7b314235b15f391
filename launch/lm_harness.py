"""lm-evaluation-harness's own command: `python launch/lm_harness.py run --model stablelm ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.lm_harness import main

if __name__ == "__main__":
    sys.exit(main())
