"""Runs on text that is not as it should be: skipped rows, unknown tokens, other columns, files that are not there."""

import json
from pathlib import Path

import pytest
from support.programs import TINY, losses, run, summary
from support.tiny import TinyCorpus, synthetic_documents

SHORT = [*TINY, "train.steps=6", "model.n_layers=1", "checkpoint.every=2"]


def rows_file(path: Path, texts: list[str], key: str = "text", bad: str = "") -> Path:
    """JSON lines; after every fourth row the line `bad`, if there is one."""
    lines = [json.dumps({key: text}) + (f"\n{bad}" if bad and n % 4 == 0 else "") for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_skipped_rows_are_in_records_and_summary_also_after_a_resume(tiny_corpus: TinyCorpus, tmp_path: Path):
    data = rows_file(tmp_path / "a.jsonl", synthetic_documents(60, seed=1), bad='{"text": "half a pair \\ud83d"}')
    base = [*SHORT, *tiny_corpus.overrides(), f"data.path={data}", "data.lanes=4", "train.global_batch_size=4"]
    refused = run("pretrain", *base, f"run.dir={tmp_path / 'refused'}")
    assert refused.returncode == 78 and not (tmp_path / "refused").exists()
    assert "a.jsonl, line 2: a lone surrogate" in refused.stderr and "data.bad_rows=skip" in refused.stderr

    base += ["data.bad_rows=skip", "train.steps=12", "model.n_layers=1"]
    whole = run("pretrain", *base, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    for stop in ("5", "8", "null"):
        part = run("pretrain", *base, f"run.dir={tmp_path / 'parts'}", f"run.stop_after={stop}")
        assert part.returncode in (0, 75), part.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    counts = [
        [record["skipped_rows"] for record in records(tmp_path / name) if "loss" in record]
        for name in ("whole", "parts")
    ]
    assert counts[0] == counts[1] and 0 < counts[0][-1] == summary(tmp_path / "parts")["skipped_rows"]


def test_text_that_the_tokenizer_cannot_restore_has_no_bits_per_byte(tiny_corpus: TinyCorpus, tmp_path: Path):
    cyrillic = str.maketrans("abdefghiklmnorstu", "абдефгхиклмнорсту")
    texts = [text.translate(cyrillic) for text in synthetic_documents(60, seed=1)]
    data = rows_file(tmp_path / "a.jsonl", texts)
    keys = [*tiny_corpus.overrides(), f"data.path={data}", f"data.validation_path={data}", "evaluate.every=3"]
    done = run("pretrain", *SHORT, *keys, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the tokens are unknown") == 1
    assert "no bits per byte (the tokens do not give the text back)" in done.stdout
    assert summary(tmp_path / "run")["val_bits_per_byte"] == {"default": None}
    written = records(tmp_path / "run")
    assert any("val_loss/default" in record for record in written)
    assert not any(name.startswith("val_bits_per_byte") for record in written for name in record)
    assert written[0]["unknown_tokens"] > 0.05

    out = tmp_path / "scores.json"
    done = run("eval", "--checkpoint", str(tmp_path / "run"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["sets"]["default"]["bits_per_byte"] is None
    done = run("eval", "--checkpoint", str(tmp_path / "run"), "--data", tiny_corpus.validation, "--out", str(out))
    assert json.loads(out.read_text())["sets"]["data"]["bits_per_byte"] > 0


def test_a_text_column_for_each_validation_set(tiny_corpus: TinyCorpus, tmp_path: Path):
    texts = synthetic_documents(30, seed=9)
    same = [rows_file(tmp_path / f"{key}.jsonl", texts, key) for key in ("text", "body")]
    sets = [
        f"data.validation={{plain: {same[0]}, other: {{path: {same[1]}, text_column: body}}}}",
        f"data.path={tiny_corpus.train}",
        f"data.tokenizer={tiny_corpus.tokenizer}",
    ]
    done = run("pretrain", *SHORT, *sets, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    loss = summary(tmp_path / "run")["val_loss"]
    assert loss["plain"] == loss["other"]

    out, checkpoint = tmp_path / "scores.json", ["--checkpoint", str(tmp_path / "run"), "--sequences", "24"]
    done = run("eval", *checkpoint, "--out", str(out))
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())["sets"]
    assert scores["plain"] == scores["other"]
    done = run("eval", *checkpoint, "--data", str(same[1]), "--text-column", "body", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["sets"]["data"] == scores["other"]
    done = run("eval", *checkpoint, "--data", str(same[1]))
    assert done.returncode == 78 and "body.jsonl, line 1: without a string under 'text'" in done.stderr


def test_all_that_is_wrong_with_the_text_is_said_at_once(tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    bad = rows_file(tmp_path / "bad.jsonl", synthetic_documents(30, seed=9), bad='{"text": "cut')
    keys = [
        f"data.path=[{tmp_path}/gone.jsonl, {tmp_path}/none-*.jsonl]",
        f"data.tokenizer={tiny_corpus.tokenizer}",
        f"data.validation={{one: {tmp_path}/nil.jsonl, two: {tmp_path}/empty.jsonl, three: {bad}}}",
    ]
    done = run("pretrain", *SHORT, *keys, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 78 and not (tmp_path / "run").exists()
    for words in (
        "gone.jsonl",
        "none-*.jsonl",
        "nil.jsonl' does not exist",
        "empty.jsonl' is empty",
        "line 2: not",
    ):
        assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("every", [0, 2])
def test_bad_rows_of_validation_text_are_found_before_the_start(tiny_corpus: TinyCorpus, tmp_path: Path, every: int):
    lines = [json.dumps({"text": text}) for text in synthetic_documents(30, seed=9)]
    lines[1] = '{"text": "caf\xe9"}'
    filler = json.dumps({"text": "a row that makes the file larger than a check reads " * (1 << 18)})
    (tmp_path / "v.jsonl").write_bytes("\n".join([*lines, filler]).encode("latin-1"))
    keys = [*tiny_corpus.overrides(), f"data.validation_path={tmp_path}/v.jsonl", f"evaluate.every={every}"]
    done = run("pretrain", *SHORT, *keys, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 78 and not (tmp_path / "run").exists()
    assert "data.validation.default: " in done.stderr and "v.jsonl, line 2: the byte 0xe9" in done.stderr


def test_a_run_of_an_older_order_is_refused(tiny_corpus: TinyCorpus, tmp_path: Path):
    keys = [*SHORT, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}"]
    assert run("pretrain", *keys, "run.stop_after=2").returncode == 75
    saved = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert saved.pop("data.order") == 2
    (tmp_path / "run" / "identity.json").write_text(json.dumps(saved))
    done = run("pretrain", *keys)
    assert done.returncode == 78
    assert "reads the rows of files in order 1, now 2" in done.stderr and "run.init_from" in done.stderr
