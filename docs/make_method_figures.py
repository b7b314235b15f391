"""Draws docs/methods/figures: the probe of every method, 48 layers of width 128 on the embedded corpus.

`python docs/make_method_figures.py [METHOD ...]`; without names, all methods of the catalogue.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stablelm.methods.catalogue import METHODS  # noqa: E402 - after the path is set

FIGURES = ROOT / "docs" / "methods" / "figures"
LARGEST = 60_000  # bytes
COLOURS = 64

CONFIG = """\
model:
  method: {method}
  n_layers: 48
  d_model: 128
  n_heads: 4
data:
  seq_len: 128
train:
  steps: 1
  global_batch_size: 4
"""


def draw(method: str) -> None:
    """Runs launch/probe.py for one method and keeps its figure; raises CalledProcessError if the probe fails."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG.format(method=method), encoding="utf-8")
        program = [sys.executable, str(ROOT / "launch" / "probe.py"), "--config", str(config), "--out", folder]
        subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        FIGURES.mkdir(parents=True, exist_ok=True)
        shrink(Path(folder) / "probe.png", FIGURES / f"{method}.png")


def shrink(source: Path, target: Path, largest: int = LARGEST) -> None:
    """Saves a PNG with a palette, and with fewer pixels until it is smaller than `largest` bytes."""
    from PIL import Image

    with Image.open(source) as opened:
        image = opened.convert("RGB")
    whole, scale = image.size, 1.0
    while True:
        image.quantize(COLOURS).save(target, optimize=True)
        if target.stat().st_size < largest:
            return
        scale *= 0.9
        with Image.open(source) as opened:
            size = (max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale)))
            image = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/methods with launch/probe.py.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="methods of the catalogue; none: all")
    for method in parser.parse_args().methods or METHODS:
        if method not in METHODS:
            parser.error(f"{method} is not a method; choose from {', '.join(METHODS)}")
        draw(method)
        print(FIGURES / f"{method}.png", flush=True)


if __name__ == "__main__":
    main()
