"""data/prepare.py: the same shards from any number of workers, after any death; masks; mistakes in one sentence."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.httpserver import serve
from support.letters import write_rows
from support.samples import REPOSITORY
from support.stores import s3_server

from stablelm.config.schema import DataConfig
from stablelm.data.formats.file_rows import documents, texts
from stablelm.data.loader import Loader
from stablelm.data.shards import row_filters, shard_files
from stablelm.data.shards.row_filters import RowFilters
from stablelm.data.shards.shard_reader import TokenShard
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError
from stablelm.programs.prepare import main
from stablelm.tokenizers import load_tokenizer, training

PROGRAM = REPOSITORY / "data" / "prepare.py"
WORDS = ["lane", "token", "layer", "stream", "norm", "head", "depth", "width", "batch", "epoch", "loss", "step"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True)


def call_here(*words: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the start of another."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(list(words))
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


def texts_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(training.train(texts_of(0, 300), vocab_size=300))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    counts = [30, 7, 0, 51, 12]
    suffixes = [".json.gz", ".json", ".jsonl", ".jsonl", ".json.gz"]
    made = [
        write_rows(folder / f"t{n}{suffix}", texts_of(n, count))
        for n, (count, suffix) in enumerate(zip(counts, suffixes, strict=True))
    ]
    os.remove(made.pop(2))  # an empty file is bad input
    return made


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def prepare(files: list[str], model: str, out: object, *words: str) -> subprocess.CompletedProcess[str]:
    here = "--workers" not in words
    common = ["--source", *files, "--tokenizer", model, "--out", str(out)]
    done = call_here(*common, "--workers", "1", *words) if here else call(*common, *words)
    assert done.returncode == 0, done.stderr
    return done


def test_shards_are_the_text_whatever_the_number_of_workers(files, model, tmp_path):
    prepare(files, model, tmp_path / "one")
    prepare(files, model, tmp_path / "three", "--workers", "3")
    for share in ("2/3", "1/3", "3/3"):
        done = prepare(files, model, tmp_path / "parts", "--part", share)
    assert "run without --part" in done.stdout
    assert not (tmp_path / "parts" / "manifest.json").exists()
    done = prepare(files, model, tmp_path / "parts", "--verify")
    assert done.stdout.count(", kept") == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "parts")
    encoder = load_tokenizer(model)
    found = shard_files.resolve(str(tmp_path / "one"), key="data.path", options=ReadOptions(retry_budget=0))
    assert [Path(path).name for path in found] == [Path(path).name + ".tokens" for path in files]
    for file, path in zip(files, found, strict=True):
        shard = TokenShard(path, tokenizer=encoder.sha256, options=ReadOptions(retry_budget=0))
        rows = shard.take(range(shard.footer.rows))
        tokens = shard.join(rows.begins, rows.ends).tolist()
        expected = [encoder.encode(text) for text in documents([file], ReadOptions(retry_budget=0))]
        assert tokens == [token for each in expected for token in [*each, encoder.eos]]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["rows"] == 100 and manifest["masked_rows"] == 0


def test_a_mask_that_was_changed_is_not_believed(files, model, tmp_path):
    out = tmp_path / "out"
    prepare([*files, write_rows(tmp_path / "copy.json", texts_of(0, 30))], model, out, "--dedup", "exact")
    resolved = shard_files.resolve(str(out), key="data.path", options=ReadOptions(retry_budget=0))
    assert len(resolved) == 5
    (mask, *_) = sorted(out.glob("*.mask"))
    bits = bytearray(mask.read_bytes())
    for damage in (lambda: mask.write_bytes(bytes([bits[0] ^ 1, *bits[1:]])), mask.unlink):
        damage()
        with pytest.raises(ConfigError, match=f"{mask.name}' is not the one that was written; run stablelm prepare"):
            shard_files.resolve(str(out), key="data.path", options=ReadOptions(retry_budget=0))


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"files": {}}', '{"files": [1]}', '{"files": [{"name": "../a"}]}', "[" * 99999]
)
def test_a_damaged_manifest_is_bad_input(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.path: .*manifest.json: not a manifest of prepared shards \(.*again"):
        shard_files.resolve(str(tmp_path), key="data.path", options=ReadOptions(retry_budget=0))


def test_a_killed_run_is_finished_by_the_next_and_its_workers_end(model, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    files = [write_rows(folder / f"t{n}.json", texts_of(n, 4000)) for n in range(8)]
    out = tmp_path / "out"
    words = ["--source", *files, "--tokenizer", model, "--out", str(out), "--workers", "2"]
    running = subprocess.Popen(
        [sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("[1/8]")
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(running.pid):
        time.sleep(0.1)
    assert not _alive(running.pid), "workers outlive a killed parent"
    assert not (out / "manifest.json").exists()
    finished = len(list(out.glob("t*.tokens")))
    assert 1 <= finished < 8
    done = prepare(files, model, out)
    assert done.stdout.count(", kept") == finished
    assert not list(out.glob(".*"))
    prepare(files, model, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def _alive(group: int) -> bool:
    """Whether a process of this group is there."""
    try:
        os.killpg(group, signal.SIG_DFL)
        return True
    except ProcessLookupError:
        return False


def test_only_what_changed_is_made_again(files, model, tmp_path):
    prepare(files, model, tmp_path / "out")
    write_rows(Path(files[1]), texts_of(9, 20))
    shard = tmp_path / "out" / (Path(files[2]).name + ".tokens")
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    done = prepare(files, model, tmp_path / "out")
    assert done.stdout.count(", kept") == 2
    prepare(files, model, tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_filters_change_masks_only(files, model, tmp_path):
    out = tmp_path / "out"
    prepare(files, model, out)
    before = contents(out)
    done = prepare(files, model, out, "--min-chars", "40", "--dedup", "exact")
    assert done.stdout.count(", kept") == 4
    after = contents(out)
    assert {name: after[name] for name in before if name.endswith(".tokens")}.items() <= before.items()
    seen, expected = set(), []
    masked = 0
    for text in (text for file in files for text in texts(file, ReadOptions(retry_budget=0))):
        left_out = len(text or "") < 40 or text in seen
        masked += left_out and bool(text)
        expected.append(left_out)
        seen.add(text)
    found = []
    for path in shard_files.resolve(str(out), key="data.path", options=ReadOptions(retry_budget=0)):
        shard = TokenShard(path, tokenizer=None, options=ReadOptions(retry_budget=0))
        rows = shard.take(range(shard.footer.rows))
        found += (rows.begins == rows.ends).tolist()
    assert found == expected and any(expected)
    assert json.loads((out / "manifest.json").read_text())["masked_rows"] == masked
    prepare(files, model, out)
    assert contents(out) == before


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_place_that_is_full_is_exit_74(files, model, tmp_path, workers):
    write_rows(Path(files[0]), texts_of(1, 9000))
    words = ["--source", *files, "--tokenizer", model, "--out", str(tmp_path / "out"), "--workers", workers]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 40; exec "$@"', "limited", sys.executable, str(PROGRAM), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 74, done.stderr
    assert "cannot be written" in done.stderr and "finished files are kept" in done.stderr
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--source", "none.json"], 78, "--source: 'none.json' does not exist"),
        (["--tokenizer", "none.model"], 78, "--tokenizer: 'none.model' does not exist"),
        (["--out", "{file}"], 78, "--out: cannot write to"),
        (["--out", "http://127.0.0.1:1/x"], 78, "--out: nothing can be written to"),
        (["--workers", "0"], 78, "--workers: must be at least 1, not 0"),
        (["--part", "4/3"], 78, "--part: '4/3' is not K/N"),
        (["--min-chars", "9", "--max-chars", "3"], 78, "exclude every document"),
        (["--dedup", "minhash", "--similarity", "2"], 78, "--similarity: must be above 0 and at most 1, not 2.0"),
        (["--source", "{bad}"], 78, "bad.json, line 2: not valid JSON"),
        (["--source", "http://127.0.0.1:1/a.json", "--retry-budget", "0"], 77, "unreadable at byte 0"),
    ],
)
def test_mistakes_are_one_sentence(words, code, says, files, model, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"text": "one"}\nnot json\n')
    given = {"--source": files[1], "--tokenizer": model, "--out": str(tmp_path / "out"), "--workers": "1"}
    given |= {key: value.format(file=files[0], bad=bad) for key, value in zip(words[::2], words[1::2], strict=True)}
    done = call_here(*[word for pair in given.items() for word in pair])
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert says in done.stderr


@pytest.mark.slow
def test_from_a_web_server_to_an_object_store_and_into_a_run(files, model, tmp_path):
    with s3_server(), serve(Path(files[0]).parent) as server:
        urls = [f"{server.url}/{Path(file).name}" for file in files]
        prepare(urls, model, "s3://bucket/shards", "--dedup", "exact")
        done = prepare(urls, model, "s3://bucket/shards", "--dedup", "exact")
        assert done.stdout.count(", kept") == 4
        prepare(files, model, tmp_path / "local", "--dedup", "exact")
        encoder = load_tokenizer(model)

        def batches(path: str) -> list:
            found = shard_files.resolve(path, key="data.path", options=ReadOptions(retry_budget=1))
            data = DataConfig(seq_len=32, lanes=8, shuffle_block=4, workers=0, retry_budget=1)
            each = Loader(found, encoder, data, seed=1, global_batch_size=8)
            return [each.next().tokens.tolist() for _ in range(9)]

        assert batches("s3://bucket/shards") == batches(str(tmp_path / "local"))


def test_near_copies_are_found_and_the_first_stays(tmp_path):
    draw = random.Random(1)
    base = [" ".join(f"w{draw.randrange(5000)}" for _ in range(200)) for _ in range(6)]
    near = base[2].rsplit(" ", 3)[0] + " and a few others"
    rows = [[*base[:3], "short", near], [base[4], base[5] + " more", base[5], "short", base[0]]]
    filters = RowFilters(duplicates="minhash")
    found = row_filters.excluded([row_filters.features(texts, filters) for texts in rows], filters)
    assert [mask.tolist() for mask in found] == [[False] * 4 + [True], [False, False, True, True, True]]
    exact = RowFilters(duplicates="exact")
    found = row_filters.excluded([row_filters.features(texts, exact) for texts in rows], exact)
    assert [mask.tolist() for mask in found] == [[False] * 5, [False, False, False, True, True]]


def test_a_filtered_document_hides_no_copy():
    filters = RowFilters(max_chars=30, duplicates="minhash")
    long = "one two three four five six seven eight"
    found = row_filters.excluded([row_filters.features([long, "five words are not enough", "x"], filters)], filters)
    assert np.concatenate(found).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("embedded", "is text, and data.source is shards"),
        ("{folder}", "has no manifest.json, which stablelm prepare writes last"),
        ("{folder}/*.tokens", "no shard matches"),
        ([], "the list of shards is empty"),
    ],
)
def test_paths_without_shards_are_bad_input(tmp_path, path, says):
    given = path.format(folder=tmp_path) if isinstance(path, str) else path
    with pytest.raises(ConfigError, match=rf"data\.path: .*{says}"):
        shard_files.resolve(given, key="data.path", options=ReadOptions(retry_budget=0))


def test_help_is_quick():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert "--dedup" in call("--help").stdout
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5
