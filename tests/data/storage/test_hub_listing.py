"""`hf://` against a stand-in for the hub; in subprocesses, since the hub's client reads its address at import."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakehub import COMMIT, FakeHub
from support.samples import REPOSITORY

PATTERN = "hf://datasets/allenai/c4/en/c4-train.*.json.gz"
FOUND = [f"hf://datasets/allenai/c4@{COMMIT}/en/c4-train.0000{index}-of-00003.json.gz" for index in range(3)]

# One answer a URL, since importing `datasets` takes seconds.
RESOLVE = """
import json, sys
from stablelm.data.corpus import resolve
from stablelm.data.inspection import check
from stablelm.data.storage.options import ReadOptions
from stablelm.data.formats.file_rows import documents
from stablelm.errors import UserError
read, *urls = sys.argv[1:]
answers = []
for url in urls:
    try:
        files = resolve(url, key="data.path", cache="unused")
        check(files, key="data.path")
        texts = list(documents(files, ReadOptions(retry_budget=20))) if read == "read" else []
        answers.append({"files": files, "texts": texts, "torch": "torch" in sys.modules})
    except UserError as error:
        answers.append({"error": str(error), "code": error.exit_code})
print(json.dumps(answers))
"""


def shard(name: int) -> bytes:
    records = [{"text": f"document {name}.{n}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for n in range(5)]
    return gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())


CARD = b"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n---\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    files = {f"en/c4-train.0000{index}-of-00003.json.gz": shard(index) for index in (2, 0, 1)}
    files |= {"en/c4-validation.00000-of-00001.json.gz": shard(9), "README.md": CARD, "en/notes.csv": b"words"}
    with FakeHub(files) as hub:
        yield hub


def ask(folder: Path, endpoint: str, *urls: str, read: bool = False, **environment: str) -> list[dict]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    variables |= environment
    command = [sys.executable, "-c", RESOLVE, "read" if read else "list", *urls]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, timeout=120)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_pattern_is_resolved_sorted_pinned_and_read_through_a_busy_hub(hub: FakeHub, tmp_path: Path):
    hub.requests.clear()
    hub.failures += [503, 429]
    [answer] = ask(tmp_path, hub.url, PATTERN, read=True)
    assert hub.failures == []
    assert answer["files"] == FOUND
    assert answer["texts"] == [f"document {name}.{n}" for name in range(3) for n in range(5)]
    assert not answer["torch"]
    contents = [path for method, path in hub.requests if method == "GET" and path.endswith(".json.gz")]
    assert contents
    assert all(f"/resolve/{COMMIT}/" in path for path in contents)
    # The list is asked for once, not once a file.
    assert sum("/tree/" in path for _, path in hub.requests) <= 4


WRONG = {
    "hf://datasets/allenai/c4/en/none*.json.gz": "no file on the hub matches",
    "hf://datasets/allenai/c9/en/*.json.gz": "the hub has no data set or revision",
    f"hf://datasets/allenai/c4@{'0' * 40}/en/*.json.gz": "the hub has no data set or revision",
    "hf://datasets/allenai/c4/en/notes.csv": "is of an unsupported file type",
}


def test_revisions_single_files_and_what_the_hub_does_not_have(hub: FakeHub, tmp_path: Path):
    one = PATTERN.replace("c4/en", f"c4@{COMMIT}/en").replace("*", "{00001,00002}-of-00003")
    (tmp_path / "allenai" / "c5").mkdir(parents=True)
    shadowed = PATTERN.replace("c4/en", "c5/en")
    first, last, *answers = ask(tmp_path, hub.url, one, shadowed, *WRONG)
    assert first["files"] == FOUND[1:]
    assert "would be looked up in the local folder 'allenai/c5'" in last["error"]
    for (url, says), answer in zip(WRONG.items(), answers, strict=True):
        assert answer["code"] == 78
        assert answer["error"].startswith("data.path: ")
        assert says in answer["error"]
        assert url.rsplit("/", 1)[-1] in answer["error"]
        assert "; " in answer["error"]


def test_offline(hub: FakeHub, tmp_path: Path):
    [answer] = ask(tmp_path, hub.url, PATTERN, HF_HUB_OFFLINE="1")
    assert answer["code"] == 78
    assert answer["error"] == (
        f"data.path: cannot reach the hub for {PATTERN!r}; give the https URL of a mirror or a folder with its files"
    )


@pytest.mark.slow
def test_a_hub_out_of_reach(tmp_path: Path):
    # Port 9 of loopback (discard) listens nowhere; the client itself retries for half a minute.
    [answer] = ask(tmp_path, "http://127.0.0.1:9", PATTERN)
    assert answer["error"].startswith(f"data.path: cannot reach the hub for {PATTERN!r}; give the https URL")
