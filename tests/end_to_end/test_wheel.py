"""The wheel in an environment of its own, from an empty folder; `.ci/run` goes on there to train (installed.sh)."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.programs import environment
from support.samples import REPOSITORY

from stablelm.config import packaged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PARTS = ("LICENSE", "MANIFEST.in", "README.md", "configs", "data", "pyproject.toml", "stablelm")


def call(*words: object, cwd: Path) -> str:
    environ = environment()
    del environ["PYTHONPATH"]  # it names the checkout
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, and the dependencies that these tests have, not the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for part in PARTS:
        if (REPOSITORY / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "cache")
            shutil.copytree(REPOSITORY / part, source / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / part, source / part)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    # The source distribution first: a wheel of it is what package indices give.
    build = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    call(sys.executable, "-c", build, cwd=source)
    (archive,) = (source / "dist").iterdir()
    call(*pip, "wheel", archive, "--no-deps", "--no-build-isolation", "--wheel-dir", place, cwd=place)
    (wheel,) = place.glob("*.whl")
    call(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    call(*pip, "--python", place / "venv", "install", "--no-deps", wheel, cwd=place)
    (site,) = (place / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "venv" / "bin"


def test_the_wheel_has_the_configurations(bin_folder: Path, tmp_path: Path):
    code = "import stablelm; from stablelm.config import packaged; print(stablelm.__file__, *packaged.names())"
    file, *names = call(bin_folder / "python", "-c", code, cwd=tmp_path).split()
    assert file.startswith(str(bin_folder.parent))
    assert names == packaged.names()
