"""An export is sent to a stand-in of the Hugging Face hub by the hub's own client."""

from pathlib import Path

import pytest
from support.exported import save_run
from support.programs import run
from support.tiny import TinyCorpus
from support.uploadhub import TOKEN, UploadHub

SMALL = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.norm=rmsnorm", "model.activation=swiglu")


@pytest.fixture(scope="module")
def small_run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "run"
    save_run(folder, tiny_corpus.tokenizer, *SMALL)
    return folder


def push(small_run: Path, out: Path, hub: UploadHub, token: str):
    home = str(out.parent / "home")
    arguments = ("--checkpoint", str(small_run), "--out", str(out), "--push", "lab/deep")
    return run("export", *arguments, HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HOME=home, HF_HUB_OFFLINE="0")


def test_an_export_is_pushed_to_a_private_repository(small_run: Path, tmp_path: Path):
    with UploadHub() as hub:
        done = push(small_run, tmp_path / "out", hub, TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.private == {"lab/deep": True}
    sent = hub.repositories["lab/deep"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: sent.get(name) for name in written} == written
    assert f"{hub.url}/lab/deep/commit/abc" in done.stdout


def test_a_token_that_may_not_write_is_found_before_the_export(small_run: Path, tmp_path: Path):
    with UploadHub() as hub:
        done = push(small_run, tmp_path / "out", hub, "hf_wrong")
    assert done.returncode == 78, done.stderr
    assert "--push lab/deep: the hub does not let this user write there" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_export(small_run: Path, tmp_path: Path):
    with UploadHub(refuses_uploads=True) as hub:
        done = push(small_run, tmp_path / "out", hub, TOKEN)
    assert done.returncode == 74, done.stderr
    assert "hf upload lab/deep" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
