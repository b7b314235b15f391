"""Lists, verifies, prunes or consolidates the checkpoints of a run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
