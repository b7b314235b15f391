"""Draws docs/figures/run-page.png: a run's page in Chromium, with the first chart and the first maps of layers alone.

    python launch/pretrain.py --config configs/quickstart.yaml run.dir=runs/deep-24 observe.every=2 \
        observe.layers_every=8 evaluate.every=40 train.steps=320
    python docs/make_run_page_figure.py runs/deep-24
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PICTURE = ROOT / "docs" / "figures" / "run-page.png"
WIDTH, HEIGHT = 1280, 1450
FRAME = 200
"""Pixels of a window's height that the page may not get."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def main(run_dir: Path) -> None:
    from PIL import Image

    from stablelm.observe.page.run_page import make_page

    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("error: chromium is not installed; install Debian's package of that name")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page, picture = Path(folder) / "page.html", Path(folder) / "page.png"
        make_page(run_dir, page)
        text = page.read_text(encoding="utf-8")
        charts, layers = text.index("</figure>") + len("</figure>"), text.index('<section aria-labelledby="layers">')
        page.write_text(text[:charts] + "</div></section>" + text[layers:], encoding="utf-8")
        given = (
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{HEIGHT + FRAME}",
            f"--screenshot={picture}",
        )
        subprocess.run([browser, *FLAGS, *given, page.as_uri()], check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    image.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
