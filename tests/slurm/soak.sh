#!/usr/bin/env bash
# A soak of slurm/pretrain.sh on the test cluster; soak.sh --help tells the options, docs/slurm.md the rest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${STABLELM_PYTHON:-$here/../../.venv/bin/python}
[ -x "$python" ] || python=$(command -v python || command -v python3)
export OMP_NUM_THREADS=1
exec "$python" "$here/soak.py" "$@"
