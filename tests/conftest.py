"""Shared set-up: helpers of tests/support on the path, one torch thread a worker process."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
