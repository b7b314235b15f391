"""`data.source: datasets` with names on the hub, against a stand-in; in programs of their own, as for `hf://`."""

import gzip
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fakehub import COMMIT, FakeHub
from support.programs import TINY, command, environment, losses, run
from support.samples import REPOSITORY
from support.tiny import TinyCorpus
from test_hub_listing import ask

VARIANTS = {"en": (1024, 8), "en.noblocklist": (1024, 8), "realnewslike": (512, 1)}
FRAGMENTS = {"en": "c4.yaml", "en.noblocklist": "c4-en.noblocklist.yaml", "realnewslike": "c4-realnewslike.yaml"}
FEATURES = [{"name": name, "dtype": "string"} for name in ("text", "timestamp", "url")]
EVEN = "def even(row):\n    return len(row['url']) % 2 == 0 and row['timestamp'].endswith('Z')\n"


def card(variants) -> bytes:
    """A card like that of allenai/c4."""
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": s, "path": f"{name}/c4-{s}.*.json.gz"} for s in ("train", "validation")],
        }
        for name in variants
    ]
    infos = [{"config_name": name, "features": FEATURES} for name in variants]
    return f"---\n{yaml.safe_dump({'configs': configs, 'dataset_info': infos})}---\n".encode()


def shard(text: str) -> bytes:
    record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}
    return gzip.compress((json.dumps(record) + "\n").encode())


@pytest.fixture(scope="module")
def c4() -> Iterator[FakeHub]:
    """C4's files under their own names, each with one document."""
    files = {"README.md": card(VARIANTS)}
    for name, counts in VARIANTS.items():
        for split, count in zip(("train", "validation"), counts, strict=True):
            for index in range(count):
                file = f"{name}/c4-{split}.{index:05d}-of-{count:05d}.json.gz"
                files[file] = shard(file)
    files["tables/data/a.csv"] = b"text,n\none,1\ntwo,2\n"
    with FakeHub(files) as hub:
        yield hub


def test_the_recipes_of_c4_and_the_names_of_its_card_are_the_same_files(c4: FakeHub, tmp_path: Path):
    asked, expected = [], []
    for name, counts in VARIANTS.items():
        recipe = yaml.safe_load((REPOSITORY / "data" / FRAGMENTS[name]).read_text())["data"]
        assert f"@{COMMIT}/{name}/" in recipe["path"]
        [validation] = recipe["validation"].values()
        for split, count, url in zip(("train", "validation"), counts, (recipe["path"], validation), strict=True):
            asked += [url, f"datasets://allenai/c4?name={name}&split={split}&revision={COMMIT}"]
            files = [f"{name}/c4-{split}.{index:05d}-of-{count:05d}.json.gz" for index in range(count)]
            expected += 2 * [[f"hf://datasets/allenai/c4@{COMMIT}/{file}" for file in files]]
    answers = ask(tmp_path, c4.url, *asked)
    assert [answer["files"] for answer in answers] == expected


WRONG = {
    "datasets://allenai/c9?split=train": "the hub has no data set or revision",
    f"datasets://allenai/c4?name=en&split=train&revision={'0' * 40}": "the hub has no data set or revision",
    "datasets://allenai/c4?name=de&split=train": "Available: ['en', 'en.noblocklist', 'realnewslike']",
    "datasets://allenai/c4?split=train": "pick one among the available configs: ['en', 'en.noblocklist'",
    "datasets://allenai/c4?name=en&split=test": "has no split 'test' but 'train', 'validation'",
}


def test_other_forms_are_read_and_mistakes_are_told(c4: FakeHub, tmp_path: Path):
    table = "datasets://allenai/c4?data_files=tables/data/a.csv&split=train"
    found, *answers = ask(tmp_path, c4.url, table, *WRONG, read=True)
    assert found["files"] == [f"datasets+csv://a.csv?file=hf://datasets/allenai/c4@{COMMIT}/tables/data/a.csv"]
    assert found["texts"] == ["one", "two"]
    for (url, says), answer in zip(WRONG.items(), answers, strict=True):
        assert answer["code"] == 78
        assert answer["error"].startswith("data.path: ")
        assert says in answer["error"]
        assert url in answer["error"]
        assert "; " in answer["error"]


@pytest.mark.slow
def test_a_run_from_the_hub_is_the_run_from_local_files_also_after_a_kill(tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "own_rows.py").write_text(EVEN)
    local = sorted(Path(tiny_corpus.train).parent.glob("*.json.gz"))
    files = {f"en/c4-train.{path.name.removeprefix('tiny-train.')}": path.read_bytes() for path in local}
    copies = tmp_path / "copies"
    copies.mkdir()
    for name, content in files.items():
        (copies / Path(name).name).write_bytes(content)
    files |= {"README.md": card(["en"]), "en/c4-validation.0.json.gz": Path(tiny_corpus.validation).read_bytes()}
    common = [*TINY, f"data.tokenizer={tiny_corpus.tokenizer}", "checkpoint.every=3", "data.filter=own_rows:even"]
    with FakeHub(files) as hub:
        variables: dict[str, Any] = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": f"{REPOSITORY}:{tmp_path}",
        }
        plain = [*common, f"data.path={copies}", f"data.validation={{c4: {tiny_corpus.validation}}}"]
        whole = run("pretrain", *plain, f"run.dir={tmp_path / 'whole'}", launcher="python", **variables)
        assert whole.returncode == 0, whole.stderr
        streamed = [*common, "data.source=datasets", "data.path=allenai/c4", "data.dataset={name: en}"]
        streamed += ["data.validation={c4: allenai/c4}", f"run.dir={tmp_path / 'killed'}"]
        process = subprocess.Popen(
            command("pretrain", *streamed), env=environment(**variables), stdout=subprocess.DEVNULL
        )
        metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        lists = json.loads((tmp_path / "killed" / "data_files.json").read_text())
        expected = [f"hf://datasets/allenai/c4@{COMMIT}/en/{path.name}" for path in sorted(copies.iterdir())]
        assert lists['"datasets://allenai/c4?name=en&split=train"'] == expected
        hub.requests.clear()
        last = run("pretrain", *streamed, processes=2, launcher="torchrun", **variables)
        assert last.returncode == 0, last.stderr
        assert "resumed from" in last.stdout
    assert hub.api_calls == []
    assert not [path for _, path in hub.requests if "README.md" in path]  # the list was kept
    own, other = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert own == pytest.approx(other, rel=1e-5)
