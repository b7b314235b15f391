"""Arguments of the programs below `data/`: a mistake in them is a bad configuration (torch-free)."""

import argparse

from stablelm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Ends with the exit code of a bad configuration."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}; see --help\n")
