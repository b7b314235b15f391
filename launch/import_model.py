"""A model of another program as a run: `python launch/import_model.py --from FOLDER --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stablelm.programs.import_model import main

if __name__ == "__main__":
    sys.exit(main())
