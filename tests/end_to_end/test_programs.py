"""The programs as the README uses them: configurations that come back, C4's files, provenance."""

import json
from pathlib import Path

import pytest
import yaml
from support.programs import TINY, run, summary
from support.samples import REPOSITORY, shared_data
from support.tiny import TinyCorpus

from stablelm.observe.sinks import read_metrics


def test_print_config_comes_back(tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = [*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}/run", "--print-config"]
    first = run("pretrain", *arguments)
    assert first.returncode == 0, first.stderr
    file = tmp_path / "resolved.yaml"
    file.write_text(first.stdout)
    resolved = yaml.safe_load(first.stdout)
    assert resolved["model"]["d_ff"] == 4 * 32
    assert resolved["model"]["vocab_size"] % 64 == 0
    again = run("pretrain", "--config", str(file), "--print-config")
    assert again.stdout == first.stdout
    assert not (tmp_path / "run").exists()


def test_quickstart_is_deep_and_leaves_derived_keys_alone():
    config = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    assert config["model"]["n_layers"] >= 24
    assert config["model"]["d_model"] >= 128
    assert not {"d_ff", "kv_heads", "max_seq_len", "vocab_size"} & set(config["model"])


@pytest.mark.slow
def test_run_directory_tells_the_whole_story(tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = [*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}", "train.steps=6", "evaluate.every=3"]
    done = run(
        "pretrain", *arguments, "observe.every=2", "observe.profile=[3,4]", "train.precision=bf16", "train.z_loss=1e-4"
    )
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "val_loss/default" in r] == [3, 6]
    wanted = {
        "tokens",
        "attempt",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "memory_bytes",
    }
    assert wanted <= set(records[0])
    told = summary(tmp_path)
    assert told["exit_code"] == 0
    assert told["step"] == 6
    assert told["tokens"] == 6 * 12 * 32
    assert told["params"] > 0
    assert told["unigram_loss"]["default"] > 0
    assert "bits per byte " in done.stdout and " the unigram baseline (" in done.stdout
    assert list((tmp_path / "tensorboard" / tmp_path.name).glob("events*"))
    assert list((tmp_path / "profile").glob("trace-rank0-steps-3-4.json"))
    attempt = json.loads((tmp_path / "provenance.json").read_text())[0]
    assert attempt["world_size"] == 1
    assert "train.steps=6" in attempt["argv"]
    assert attempt["versions"]["torch"]
    assert attempt["attention_kernel"] == "sdpa"


@pytest.mark.slow
def test_c4_with_the_t5_tokenizer(tmp_path: Path):
    """C4's own files and a 32k unigram model: a batch norm of a real run, two lanes a file and more."""
    folder, tokenizer = shared_data("c4/en"), shared_data("tokenizers/t5-32k-unigram.model")
    done = run(
        "pretrain",
        *TINY,
        f"data.path={folder}/c4-train.*.json.gz",
        f"data.validation={{c4: {folder}/c4-validation.*.json.gz}}",
        f"data.tokenizer={tokenizer}",
        f"run.dir={tmp_path}",
        "data.lanes=96",
        "train.steps=12",
        "train.lr=3e-3",
        "train.warmup_steps=2",
    )
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 0.3
    assert 1 < summary(tmp_path)["val_bits_per_byte"]["c4"] < 6
