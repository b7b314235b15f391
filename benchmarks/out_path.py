"""The --out of a benchmark, checked before hours of work."""

import argparse
from pathlib import Path

from stablelm.errors import ConfigError
from stablelm.out_file import check_out


def out_path(text: str) -> Path:
    """As the type of an argument: a file that can be written, or the parser says why it cannot."""
    try:
        check_out(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--out ")) from None
    return Path(text)
