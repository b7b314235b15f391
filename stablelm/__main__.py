"""`python -m stablelm COMMAND ...`, also under launchers: `torchrun -m stablelm pretrain ...`."""

import sys

from stablelm.programs.command import main

if __name__ == "__main__":
    sys.exit(main())
