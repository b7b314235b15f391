"""The export program: what it writes, what it refuses, in how much memory, and that others load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.exported import save_run
from support.programs import TINY, environment, run
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.export.shards import write_shards
from stablelm.export.weights import LazyTensor
from stablelm.export.writer import ExportRequest, export

SMALL = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.kv_heads=2")
LLAMA = (*SMALL, "model.norm=rmsnorm", "model.activation=swiglu")


@pytest.fixture(scope="module")
def small_run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    save_run(folder, tiny_corpus.tokenizer, *LLAMA, f"data.validation_path={tiny_corpus.validation}")
    return folder


def test_a_trained_run_of_several_processes_is_exported(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "train.steps=2",
               "model.method=sigma_reparam", "model.norm=rmsnorm", "model.activation=swiglu", "engine.kind=fsdp2",
               processes=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "format llama" in done.stdout
    assert "in 0 of 60 documents" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"step": 2' in card
    assert '"val_loss"' in card
    assert '"commit"' in card
    assert "tiny-train.00000-of-00004.json.gz" in card


def test_weights_are_written_in_files_of_the_size_asked_for(small_run: Path, tmp_path: Path):
    export(ExportRequest(str(small_run), tmp_path / "whole", dtype="fp32"))
    export(ExportRequest(str(small_run), tmp_path / "parts", dtype="fp32", shard_bytes=20_000))
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as whole:
        assert set(whole.keys()) == set(index["weight_map"])
        total = 0
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "parts" / file, "pt") as part:
                assert torch.equal(part.get_tensor(name), whole.get_tensor(name))
                total += part.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == total
    assert all(path.stat().st_size < 20_000 + 4096 or len(_names(path)) == 1 for path in files)


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_transformers_loads_tokenizer_and_model_and_generates(small_run: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from stablelm.tokenizers import load_tokenizer

    export(ExportRequest(str(small_run), tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own = load_tokenizer(tiny_corpus.tokenizer)
    for text in ("ban der lim.", "  two  spaces </s> and <unk>\n", ""):
        assert tokenizer(text)["input_ids"] == own.encode(text)
    assert tokenizer.eos_token_id == own.eos
    assert tokenizer.chat_template is None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    prompts = tokenizer(["ban der", "lim"], return_tensors="pt", padding=True, padding_side="left")
    assert model.generate(**prompts, max_new_tokens=4, do_sample=False).shape[0] == 2


def test_a_run_cannot_write_the_model_card_out_of_its_blocks(tiny_corpus: TinyCorpus, tmp_path: Path):
    foreign = "```\n# Model of somebody else \x1b[31m"
    folder = tmp_path / "run"
    save_run(folder, tiny_corpus.tokenizer, *LLAMA)
    summary = {"step": 1, "exit_code": 0, "loss": foreign, "tokens": 1}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "provenance.json").write_text(json.dumps([{"attempt": 1, "commit": foreign}]))
    export(ExportRequest(str(folder), tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card
    assert "\n# Model of somebody else" not in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gpt2"], "model.activation=swiglu has a gate"),
        (["--format", "gemma2"], "model.placement=pre has no norms on its branches"),
        (["--dtype", "q8_0"], "--dtype q8_0 is for --format gguf alone"),
        (["--push", "nobody"], "write OWNER/NAME"),
        (["--check-tokenizer", "/none/such.jsonl"], "--check-tokenizer"),
        (["--check-tokenizer", "/none/such.jsonl", "--format", "gguf"], "--format gguf does not write"),
        (["--tokenizer", "/none/such.model"], "/none/such.model"),
        (["--checkpoint", "/none/such"], "/none/such"),
        (["--shard-gb", "many"], "many is not a size in gigabytes"),
        (["--format", "lama"], "did you mean llama?"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(arguments: list[str], words: str, small_run: Path, tmp_path: Path):
    done = run("export", "--checkpoint", str(small_run), "--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 78, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_program_names_every_format():
    from stablelm.export.formats.choice import GGUF, OWN, STANDARD
    from stablelm.programs.export import FORMATS

    assert ("auto", *STANDARD, OWN, GGUF) == FORMATS


def test_mistakes_in_arguments_are_told_without_torch():
    code = "import sys; from stablelm.programs.export import main\ntry: main(['--out', 'x'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stderr


def test_another_tokenizer_than_the_runs_is_refused(small_run: Path, tmp_path: Path):
    from support.tiny import make_tiny_corpus

    other = make_tiny_corpus(tmp_path / "other", files=1, documents=50).tokenizer
    with pytest.raises(ConfigError, match="is not the one that"):
        export(ExportRequest(str(small_run), tmp_path / "out", tokenizer=other))
    assert not (tmp_path / "out").exists()


def test_what_is_at_out_stays(small_run: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link", "file/such", "file/none/such"):
        with pytest.raises(ConfigError, match="--out"):
            export(ExportRequest(str(small_run), tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "link"}
    (tmp_path / "empty").mkdir()
    export(ExportRequest(str(small_run), tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_export_that_fails_leaves_nothing(small_run: Path, tmp_path: Path):
    damaged = next(small_run.glob("checkpoints/step-*/tensors/*.safetensors"))
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-8])
        done = run("export", "--checkpoint", str(small_run), "--out", str(tmp_path / "new" / "folder" / "out"))
    finally:
        damaged.write_bytes(content)
    assert done.returncode == 78, done.stderr
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import re, sys, threading
from pathlib import Path
from stablelm.export.writer import ExportRequest, export

def anonymous():  # mapped files are not counted: the system takes their pages back
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

export(ExportRequest(sys.argv[1], Path(sys.argv[3])))
done, seen = threading.Event(), [anonymous()]
thread = threading.Thread(target=watch)
thread.start()
export(ExportRequest(sys.argv[2], Path(sys.argv[4]), dtype="fp32", shard_bytes=16 << 20))
done.set()
thread.join()
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(small_run: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    """A model of 220 MB in fp32, at most two of its files and a little more above what a small one needs."""
    sizes = ("model.n_layers=24", "model.d_model=512", "model.n_heads=8", "model.d_ff=1024")
    shape = (*sizes, "model.norm=rmsnorm", "model.activation=swiglu", "model.stream=scaled", "model.init=fan_in")
    _, module = save_run(tmp_path / "run", tiny_corpus.tokenizer, *shape)
    assert sum(parameter.nbytes for parameter in module.parameters()) > 220e6
    places = [small_run, tmp_path / "run", tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, places)],
        capture_output=True, text=True, check=False,
        # Without this, glibc keeps freed tensors in its heap, up to 100 MB of them, and counts what nobody holds.
        env=environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * (16 << 20) + (16 << 20)


def test_a_tensor_is_made_only_when_it_is_written(tmp_path: Path):
    alive = [0, 0]

    def make() -> torch.Tensor:
        made = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        alive[0] += 1
        assert made >= (alive[0] - 2) * 4000
        return torch.ones(1000, dtype=torch.float64)

    tensors = [(f"t{index}", LazyTensor((1000,), make)) for index in range(8)]
    assert write_shards(tmp_path, iter(tensors), torch.float32, shard_bytes=9000) == 8000
    assert alive[0] == 8
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


ALONE = """
import sys
sys.modules["stablelm"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
prompt = tokenizer("ban der lim", return_tensors="pt")
out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(out[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", LLAMA),
        ("qwen3", (*LLAMA, "model.attention.qk_norm=true")),
        ("gemma2", (*LLAMA, "model.method=peri_ln", "model.attention.logit_cap=20")),
        ("gpt2", ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.method=gpt2")),
    ],
)
def test_a_process_without_stablelm_generates(
    name: str, overrides: tuple[str, ...], tiny_corpus: TinyCorpus, tmp_path: Path
):
    pytest.importorskip("transformers")
    folder, _ = save_run(tmp_path / "run", tiny_corpus.tokenizer, *overrides)
    assert export(ExportRequest(str(folder), tmp_path / "out")).format == name
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**alone, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
