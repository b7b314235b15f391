"""Depth studies: `python launch/study.py expand|run|submit|status|report --study FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.study import main

if __name__ == "__main__":
    sys.exit(main())
