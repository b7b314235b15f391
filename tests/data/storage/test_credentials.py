"""Whom credentials are sent to: the server they are for, and no other that it, or a configuration, names."""

import base64
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.fakehub import COMMIT, FakeHub
from support.faulty_stores import BLOCK, CONTENT, NAME, TEXTS
from support.httpserver import serve
from support.programs import TINY, run
from support.tiny import TinyCorpus

from stablelm.data.formats.file_rows import documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError

FILE = NAME.rsplit("/", 1)[1]
SECRETS = {"Authorization", "Cookie", "X-Api-Key"}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_credential_follows_a_redirect_to_another_origin(tmp_path, monkeypatch, status):
    (tmp_path / FILE).write_bytes(CONTENT)
    (tmp_path / "netrc").write_text("default login me password hush-hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    mine = {"Cookie": "session=hush-hush", "X-Api-Key": "hush-hush"}
    # The same address for the client, which another host may well share.
    storage = {"http.client_kwargs.headers.Cookie": mine["Cookie"], "http.headers.X-Api-Key": mine["X-Api-Key"]}
    with serve(tmp_path) as other, serve(tmp_path) as server:
        server.moved = (status, f"{other.url}/{FILE}")
        got = list(documents([f"{server.url}/{FILE}"], ReadOptions(block=BLOCK, storage=storage)))
        assert got == TEXTS
        basic = "Basic " + base64.b64encode(b"me:hush-hush").decode()
        assert all(headers.items() >= {**mine, "Authorization": basic}.items() for headers in server.headers)
        assert [headers for headers in other.headers if SECRETS & set(headers)] == []
        assert len(other.headers) > 5


def test_the_hubs_token_goes_to_hf_endpoint_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    url = f"hf://datasets/allenai/c4@{COMMIT}/{NAME}"
    with FakeHub({NAME: CONTENT}) as hub, FakeHub({NAME: CONTENT}) as other:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        mirror = ReadOptions(block=BLOCK, storage={"hf.endpoint": other.url})
        assert list(documents([url], mirror)) == TEXTS
        assert other.credentials["hub"] == {None}
        other.token = "hf_word"
        with pytest.raises(DataError, match=rf"answers 401; a token is sent to HF_ENDPOINT alone, which is {hub.url}"):
            list(documents([url], ReadOptions(block=BLOCK, storage={"hf.endpoint": other.url})))
        assert list(documents([url], ReadOptions(block=BLOCK))) == TEXTS
        assert hub.credentials["hub"] == {"Bearer hf_word"}


def test_what_a_run_writes_and_says_holds_no_credential(tiny_corpus: TinyCorpus, tmp_path: Path):
    """Given by the environment, as it must be, and repeated by a server in what it answers."""
    folder, run_dir = Path(tiny_corpus.train).parent, tmp_path / "run"
    secret = "hush4hush4hush4"
    with serve(folder) as server:
        server.wanted = ("X-Api-Key", secret)
        path = f"{server.url}/tiny-train.{{00000..00003}}-of-00004.json.gz"
        line = (*TINY, *tiny_corpus.overrides(), f"data.path={path}", f"run.dir={run_dir}", "train.steps=6")
        variable = f'{{"headers": {{"X-Api-Key": "{secret}"}}}}'
        refused = run("pretrain", *line)
        assert refused.returncode == 78, refused.stderr
        done = run("pretrain", *line, "run.stop_after=4", launcher="python", FSSPEC_HTTP=variable)
        assert done.returncode == 75, done.stderr
        server.moved = (302, f"ftp://me:{secret}@host/{secret}?signature={secret}")
        lost = run("pretrain", *line, "data.retry_budget=1", launcher="python", FSSPEC_HTTP=variable)
        assert lost.returncode == 77, lost.stderr
    assert secret not in done.stdout + done.stderr + lost.stdout + lost.stderr
    found = subprocess.run(["grep", "-rl", secret, str(run_dir)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
