"""The dependencies of pyproject.toml with those of the named extras, a line each: `python requirements.py s3 gcs`."""

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in sys.argv[1:]]
    print(*project["dependencies"], *(line for extra in extras for line in extra), sep="\n")
