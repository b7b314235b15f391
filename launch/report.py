"""One HTML page of a run: `python launch/report.py RUN_DIR [--out FILE.html]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.report import main

if __name__ == "__main__":
    sys.exit(main())
