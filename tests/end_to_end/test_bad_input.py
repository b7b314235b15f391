"""Every mistake of a user gets one clear sentence and its exit code, and nothing is lost or created."""

import gzip
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from support.programs import LAUNCH, TINY, command, environment, run, summary
from support.tiny import TinyCorpus, synthetic_documents, write_documents

from stablelm.programs.pretrain import start


@pytest.fixture
def begin(tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Starts a run in this process with some keys changed; returns the exit code and what stderr says."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "SLURM_")):
            monkeypatch.delenv(name)

    def attempt(*changes: str, files: tuple[str, ...] = (), resume: str = "auto") -> tuple[int, str]:
        overrides = [*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", *changes]
        code = start(
            files=list(files),
            overrides=overrides,
            resume=resume,
            print_config=False,
            argv=["test"],
            started=time.time(),
        )
        return code, capsys.readouterr().err

    yield attempt
    assert not (tmp_path / "run").exists(), "a refused run must create nothing"


def one_sentence(text: str, *words: str) -> None:
    """`text` is one error line, without a traceback, that holds all the words."""
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stpes=1", ["unknown key train.stpes, did you mean train.steps?", "argument train.stpes=1"]),
        ("model.lr=1e-3", ["model.lr", "train.lr"]),
        ("train.steps=many", ["train.steps=many must be an integer"]),
        ("train.steps=3.7", ["train.steps", "3.7"]),
        ("model.method=pre_nl", ["model.method=pre_nl", "pre_ln"]),
        ("model.d_model=33", ["model.d_model=33", "model.n_heads=2"]),
        ("model.vocab_size=100", ["model.vocab_size=100", "tokenizer"]),
        ("model.vocab_size=50000", ["model.vocab_size=50000", "tokenizer"]),
        ("run.init_from=/nowhere/run", ["/nowhere/run"]),
    ],
)
def test_configuration(begin, change: str, words: list[str]):
    code, said = begin(change)
    assert code == 78
    one_sentence(said, *words)


def test_origin_of_a_wrong_value_in_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  warmup_steps: 3\n  lr: fast\n")
    with_lr_from_the_file = [key for key in TINY if not key.startswith("train.lr")]
    done = run("pretrain", "--config", str(file), *with_lr_from_the_file)
    assert done.returncode == 78
    one_sentence(done.stderr, "train.lr=fast", "mine.yaml:3")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.json.gz", ["data.path", "missing.json.gz"]),
        ("nothing-*.json.gz", ["data.path", "nothing-*.json.gz"]),
        ("empty-folder", ["data.path", "empty-folder"]),
        ("plain.json.gz", ["data.path", "plain.json.gz", "gzip"]),
        ("truncated.json.gz", ["data.path", "truncated.json.gz"]),
        ("notjson.json.gz", ["data.path", "notjson.json.gz", "JSON"]),
        ("notext.json.gz", ["data.path", "notext.json.gz", "text"]),
        ("empty.json.gz", ["data.path", "empty.json.gz"]),
        ("short.json.gz", ["data.path", "one batch"]),
    ],
)
def test_text(begin, path: str, words: list[str], tmp_path: Path):
    good = write_documents(tmp_path / "good.json.gz", synthetic_documents(40, seed=3))
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "plain.json.gz").write_bytes(gzip.decompress(good.read_bytes()))
    (tmp_path / "truncated.json.gz").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "notjson.json.gz").write_bytes(gzip.compress(b"<html>\n"))
    (tmp_path / "notext.json.gz").write_bytes(gzip.compress(b'{"body": "a"}\n'))
    (tmp_path / "empty.json.gz").write_bytes(gzip.compress(b""))
    write_documents(tmp_path / "short.json.gz", ["ban der"] * 12)
    code, said = begin(f"data.path={tmp_path / path}")
    assert code == 78
    one_sentence(said, *words)


def test_too_few_documents_for_the_lanes(begin, tmp_path: Path):
    write_documents(tmp_path / "few.json.gz", synthetic_documents(30, seed=3))
    code, said = begin(f"data.path={tmp_path}/few.json.gz", "data.lanes=48")
    assert code == 78
    one_sentence(said, "data.lanes", "48 lanes", "at most 30")


def test_tokenizer(begin, tmp_path: Path):
    code, said = begin("data.tokenizer=/nowhere/t5.model")
    assert code == 78
    one_sentence(said, "data.tokenizer", "/nowhere/t5.model")
    (tmp_path / "bad.model").write_text("not a model")
    code, said = begin(f"data.tokenizer={tmp_path}/bad.model")
    assert code == 78
    one_sentence(said, "data.tokenizer", "bad.model")


@pytest.mark.parametrize(
    ("world_size", "changes", "words"),
    [
        (5, [], ["5", "data.lanes=12"]),
        (3, ["train.micro_batch_size=8"], ["train.micro_batch_size=8", "train.global_batch_size=12"]),
        (2, ["engine.kind=single"], ["engine.kind=single", "2 processes"]),
    ],
)
def test_world_size_lanes_and_batches(
    begin, world_size: int, changes: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    code, said = begin(*changes)
    assert code == 78
    one_sentence(said, *words)


def test_accelerates_flags_against_the_configuration(begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, said = begin("engine.kind=ddp")
    assert code == 78
    one_sentence(said, "engine.kind=ddp contradicts accelerate's flags, which ask for fsdp2")
    code, said = begin("engine.kind=ddp", "model.method=pre_nl")
    assert code == 78
    one_sentence(said, "engine.kind=ddp contradicts accelerate's flags", "did you mean pre_ln?")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    code, said = begin("train.precision=fp32")
    assert code == 78
    one_sentence(said, "train.precision=fp32", "bf16")


def test_resume_argument(begin):
    code, said = begin(resume="/nowhere/run")
    assert code == 78
    one_sentence(said, "--resume /nowhere/run does not exist")


def test_help_and_configuration_errors_are_quick():
    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run(command("pretrain", *arguments), env=environment(), capture_output=True, check=False)
        return time.perf_counter() - began

    assert min(seconds("--help") for _ in range(3)) < 0.5
    assert min(seconds("train.stpes=1") for _ in range(3)) < 0.5
    code = "import sys; sys.argv=['x','train.stpes=1']; sys.path.insert(0, sys.path[0]); import runpy\n"
    code += f"try: runpy.run_path({str(LAUNCH / 'pretrain.py')!r}, run_name='__main__')\n"
    code += "except SystemExit as e: assert e.code == 78 and 'torch' not in sys.modules"
    subprocess.run([*command("pretrain")[:1], "-c", code], env=environment(), check=True, capture_output=True)


# What follows happens after the start, so it runs the program itself.


@pytest.fixture
def finished(tiny_corpus: TinyCorpus, tmp_path: Path) -> list[str]:
    """A run of four steps with two checkpoints; returns the arguments that made it."""
    arguments = [*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "train.steps=4", "checkpoint.every=2"]
    done = run("pretrain", *arguments)
    assert done.returncode == 0, done.stderr
    return arguments


@pytest.mark.slow
def test_run_directory_of_another_configuration(finished: list[str], tmp_path: Path):
    before = (tmp_path / "run" / "config.yaml").read_text()
    other = run("pretrain", *finished, "train.lr=1e-3", "model.n_layers=4")
    assert other.returncode == 78
    one_sentence(other.stderr, "train.lr", "0.001", "model.n_layers", "run.dir")
    assert "engine" not in other.stderr
    anew = run("pretrain", *finished, "--resume", "none")
    assert anew.returncode == 78
    one_sentence(anew.stderr, "--resume none would overwrite")
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_and_says_so(finished: list[str], tmp_path: Path):
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    part = next((newest / "tensors").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    again = run("pretrain", *finished)
    assert again.returncode == 0, again.stderr
    assert "step-00000004 is damaged" in again.stdout
    assert "resumed from" in again.stdout
    assert "step-00000002" in again.stdout
    assert summary(tmp_path / "run")["step"] == 4
    assert list((tmp_path / "run" / "checkpoints").glob("damaged-step-00000004*")), "damaged checkpoints are kept"


TOO_LARGE_TO_BE_READ_FIRST = json.dumps({"text": "a row that makes the file larger than a check reads " * (1 << 18)})


@pytest.mark.slow
def test_damage_in_mid_stream_ends_with_77_and_the_last_checkpoint(tiny_corpus: TinyCorpus, tmp_path: Path):
    texts = [json.dumps({"text": text}) for text in synthetic_documents(400, seed=1)]
    texts[390] = '{"text": "cut off he'
    data = tmp_path / "bad.json"
    data.write_text("\n".join([*texts, TOO_LARGE_TO_BE_READ_FIRST]) + "\n")
    arguments = [
        *TINY,
        *tiny_corpus.overrides(),
        f"run.dir={tmp_path / 'run'}",
        f"data.path={data}",
        "train.steps=2000",
    ]
    done = run("pretrain", *arguments, "checkpoint.every=5", "data.lanes=1", "data.shuffle_block=1")
    assert done.returncode == 77, done.stderr
    one_sentence(done.stderr, "bad.json", "391")
    told = summary(tmp_path / "run")
    assert told["exit_code"] == 77
    assert told["checkpointed_step"] > 0
    assert (tmp_path / "run" / "checkpoints" / f"step-{told['checkpointed_step']:08d}" / "COMMITTED").exists()


@pytest.mark.slow
def test_one_ranks_damaged_file_ends_both_with_one_cause(tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "text").mkdir()
    texts = [json.dumps({"text": text}) for text in synthetic_documents(300, seed=1)]
    (tmp_path / "text" / "good.json").write_text("\n".join(texts) + "\n")
    texts[200] = '{"text": "cut off he'
    (tmp_path / "text" / "bad.json").write_text("\n".join([*texts, TOO_LARGE_TO_BE_READ_FIRST]) + "\n")
    began = time.monotonic()
    changes = [
        "train.steps=2000",
        "checkpoint.every=5",
        "data.lanes=2",
        "data.shuffle_block=1",
        f"data.path={tmp_path}/text",
    ]
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", *changes, processes=2)
    assert time.monotonic() - began < 90
    told = summary(tmp_path / "run")
    assert told["exit_code"] == 77
    assert "bad.json" in told["reason"]
    assert "201" in told["reason"]
    assert done.stderr.count(told["reason"]) == 1


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


def on_small_disk(options: str, place: Path, line: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command with a tmpfs of its own mounted at `place`, then says what is on it."""
    script = (
        f'mount -t tmpfs -o {options} none {place} && shift && "$@"; code=$?; find {place} -name COMMITTED; exit $code'
    )
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", "sh", *line],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small file system")
def test_full_disk_keeps_the_last_commit(tiny_corpus: TinyCorpus, tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    # Room for two checkpoints of about 0.9 MB, what the start writes included, but not for four.
    line = command(
        "pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={place}/run", "checkpoint.every=2", "checkpoint.keep=9"
    )
    done = on_small_disk("size=3m", place, line)
    assert done.returncode == 74, done.stderr
    one_sentence(done.stderr, str(place), "space")
    assert "COMMITTED" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a read-only file system")
def test_read_only_disk(tiny_corpus: TinyCorpus, tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    line = command("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={place}/run")
    done = on_small_disk("ro", place, line)
    assert done.returncode == 74, done.stderr
    one_sentence(done.stderr, f"{place}/run cannot be written", "Read-only")


@pytest.mark.slow
def test_one_message_for_all_ranks(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run(
        "pretrain",
        *TINY,
        *tiny_corpus.overrides(),
        f"run.dir={tmp_path / 'run'}",
        "data.path=/nowhere.json",
        processes=3,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "data.path" in done.stderr
    assert not (tmp_path / "run").exists()
