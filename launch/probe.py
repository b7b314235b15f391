"""Signal and gradient at initialisation, predicted and measured: `python launch/probe.py --config FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.probe import main

if __name__ == "__main__":
    sys.exit(main())
