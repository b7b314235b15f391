"""launch/generate.py and the public functions on a trained run, and what a user may get wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.programs import TINY, command, environment, run
from support.tiny import TinyCorpus

import stablelm
from stablelm.errors import ConfigError
from stablelm.evaluate.trained_run import load_module, open_run


@pytest.fixture(scope="module")
def trained(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a model with spectral norms, and of learned positions for 32 tokens."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ("train.steps=30", "train.lr=3e-3", "train.warmup_steps=0", "model.method=sigma_reparam")
    done = run(
        "pretrain", *TINY, *tiny_corpus.overrides(), *options, f"run.dir={folder}", "model.attention.position=learned"
    )
    assert done.returncode == 0, done.stderr
    return str(folder)


def generated(trained: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run("generate", "--checkpoint", trained, "--max-new-tokens", "12", *arguments)
    assert done.returncode == code, done.stderr
    return done


def test_one_text_follows_its_prompt_and_equals_the_function(trained: str, tmp_path: Path):
    out = tmp_path / "texts.jsonl"
    shown = generated(trained, "--prompt", "bato de", "--seed", "3", "--top-p", "0.9", "--out", str(out)).stdout
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert shown == f"bato de{record['text']}\n"
    assert record["prompt"] == "bato de"
    assert record["ended"] in ("eos", "length")
    assert 0 < record["new_tokens"] <= 12
    model = stablelm.load_model(trained)
    parts: list[tuple[int, str]] = []
    options = {"max_new_tokens": 12, "top_p": 0.9, "seed": 3}
    texts = stablelm.generate(model, "bato de", grown=lambda *part: parts.append(part), **options)
    assert texts == [record["text"]] == ["".join(text for _, text in parts)]
    both = stablelm.generate(model, ["hu", "bato de"], samples=2, **options)
    assert both[2] == record["text"]
    assert len(set(both)) == 4


def test_several_prompts_come_with_their_samples(trained: str, tmp_path: Path):
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("bato\n\nde fin\n")
    records.write_text('{"prompt": "bato", "id": 7}\n{"prompt": "de fin"}\n')
    found = []
    for file in (lines, records):
        out = tmp_path / "texts.jsonl"
        shown = generated(trained, "--prompts", str(file), "--samples", "2", "--out", str(out)).stdout
        found.append([json.loads(line) for line in out.read_text().splitlines()])
        assert all(each["prompt"] + each["text"] in shown for each in found[-1])
    assert found[0] == found[1]
    assert [(each["prompt"], each["sample"]) for each in found[0]] == [
        ("bato", 0), ("bato", 1), ("de fin", 0), ("de fin", 1),
    ]  # fmt: skip


def test_standard_input_is_a_prompt_and_stop_strings_end_it(trained: str):
    line = command("generate", "--checkpoint", trained, "--temperature", "0", "--max-new-tokens", "20", "--stop", " ")
    done = subprocess.run(
        line, input="bato de\n", env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")
    assert text.startswith("bato de")
    assert " " not in text.removeprefix("bato de")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "prompt 1 is empty; give it at least a word"),
        (["--prompt", "bato " * 40], "the 32 positions of the model's table (model.max_seq_len); shorten it"),
        (["--prompt", "bato", "--max-new-tokens", "40"], "ask for at most 31 new tokens, or shorten it"),
        (["--prompt", "bato", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["--prompt", "bato", "--top-p", "2"], "top_p=2.0 must be above 0 and at most 1"),
        (["--prompt", "bato", "--samples", "0"], "samples=0 must be at least 1"),
        (
            ["--prompt", "bato", "--samples", "2", "--temperature", "0"],
            "samples=2 texts of a prompt are equal with",
        ),
        (["--prompt", "bato", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--prompt", "bato", "--device", "toaster"], "device=toaster is not one of this machine"),
        (["--prompt", "bato", "--precision", "fp8"], "unknown --precision fp8"),
        (["--prompt", "bato", "--prompts", "x"], "not allowed with argument --prompt"),
        (["--prompt", "bato", "--out", "/nowhere/at/all.jsonl"], "its folder does not exist; create it first"),
        (["--prompt", "bato", "--out", "."], "--out . is a directory; name a file"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: No such file or directory; name a readable file"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt; write one a line"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2: it has no string under the key prompt; write lines such as"),
        (["--prompts", "torn.jsonl"], "torn.jsonl:1: not JSON"),
        (["--prompts", "bytes.txt"], "bytes.txt is not UTF-8 text"),
        (["--prompts", "half.jsonl"], "prompt 1 is not Unicode text"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    arguments: list[str], words: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    Path("torn.jsonl").write_text('{"prompt": "a\n')
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    Path("half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    done = run("generate", "--checkpoint", trained, *arguments, cwd=tmp_path)
    assert done.returncode == 78, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir()) == ["bad.jsonl", "bytes.txt", "empty.txt", "half.jsonl", "torn.jsonl"]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path):
    done = run("generate", "--checkpoint", str(tmp_path), "--prompt", "a")
    assert done.returncode == 78
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("precision", [None, "fp32", "fp64"])
@torch.no_grad()
def test_a_loaded_model_computes_what_the_trained_one_does(precision: str | None, trained: str):
    opened = open_run(trained)
    model = stablelm.load_model(trained, precision=precision)
    tokens = torch.tensor([opened.tokenizer.encode("bato de fin hu")])
    expected = load_module(opened)
    wanted = expected.logits(expected(tokens))
    found = model.module.logits(model.module(tokens))
    assert found.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_precisions_that_there_are_not_are_refused(trained: str):
    with pytest.raises(ConfigError, match="precision=fp8 must be one of fp32, bf16, fp64"):
        stablelm.load_model(trained, precision="fp8")
    model = stablelm.load_model(trained, precision="bf16")
    assert model.module.layers[0].attention.body.query.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert stablelm.generate(model, "bato", max_new_tokens=5, temperature=0)


def test_the_public_names_cost_nothing_until_they_are_used():
    script = "import stablelm, sys; assert 'torch' not in sys.modules; assert 'generate' in dir(stablelm)"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
    with pytest.raises(AttributeError, match="no attribute 'generated'"):
        stablelm.generated  # noqa: B018
