"""A run before it starts, on any number of accelerators: `python launch/plan.py --config FILE --world-size W`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.plan import main

if __name__ == "__main__":
    sys.exit(main())
