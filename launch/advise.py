"""Which learning rate for a method at a size, from recorded studies: `python launch/advise.py --method M ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.advise import main

if __name__ == "__main__":
    sys.exit(main())
