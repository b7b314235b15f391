"""A folder that cannot be imported gives one sentence and exit code 78, and nothing is created."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.programs import run
from support.public_models import llama_tensors, write_llama
from support.tiny import TinyCorpus

from stablelm.programs.import_model import main
from stablelm.tokenizers import load_tokenizer

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_head": 2, "n_layer": 3}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The sentence with which `folder` is refused."""

    def sentence(folder: Path, *arguments: str, out: Path = tmp_path / "made" / "run") -> str:
        code = main(["--from", str(folder), "--out", str(out), *arguments])
        said = capsys.readouterr().err
        assert code == 78, said
        assert said.count("error: ") == 1 and said.count("\n") == 1 and "Traceback" not in said, said
        return said

    yield sentence
    assert not (tmp_path / "made").exists(), "a refused import must create nothing"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, ["model_type='gemma2'", "llama, mistral, qwen2, qwen3, gpt2"]),
        ({"model_type": None}, ["model_type=''", "gpt2"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"hidden_size": "16"}, ["hidden_size='16'", "integer"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"hidden_size": None}, ["lacks hidden_size"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "tensors"]),
        ({"num_hidden_layers": 4}, ["lacks tensors", "model.layers.3."]),
        ({"num_hidden_layers": 2}, ["holds tensors", "model.layers.2."]),
        ({"intermediate_size": 64}, ["has shape [32, 16]", "[64, 16]"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight has shape [8, 16]"]),
        ({"head_dim": 4}, ["head_dim=4", "8 features", "hidden_size=16"]),
        ({"num_attention_heads": 3}, ["num_attention_heads=3"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps=-1"]),
        ({"hidden_act": "relu"}, ["hidden_act='relu'", "silu"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "true or false"]),
        ({"attention_bias": True}, ["lacks tensors", "bias"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "llama3"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, ["rope_parameters", "yarn"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
            ["model.max_seq_len=16"],
        ),
        ({"rope_theta": "big"}, ["rope_theta='big'"]),
        ({"rope_parameters": [1]}, ["rope_parameters=[1]"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8},
         ["sliding_window=8", "model.max_seq_len=8"]),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, ["head_dim=128"]),
        ({"eos_token_id": 77}, ["eos_token_id=77", "--tokenizer"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id='</s>'"]),
        ({"vocab_size": 7}, ["embed_tokens.weight has shape"]),
    ],
    ids=lambda value: next(iter(value.items())).__repr__()[:50] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_config_that_ours_cannot_be(changes: dict[str, Any], words: list[str], refused, tiny_corpus, tmp_path: Path):
    said = refused(write_llama(tmp_path / "folder", tiny_corpus.tokenizer, changes))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        ({"add_cross_attention": True}, ["add_cross_attention=True"]),
        ({"activation_function": "silu"}, ["activation_function='silu'", "gelu_new", "relu"]),
        ({"n_head": 3}, ["n_embd=16", "n_head=3"]),
        ({}, ["lacks tensors", "transformer.h.0."]),
    ],
)
def test_a_gpt2_that_ours_cannot_be(changes: dict, words: list[str], refused, tiny_corpus, tmp_path: Path):
    said = refused(write_llama(tmp_path / "folder", tiny_corpus.tokenizer, {**GPT2, **changes}))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
        {"rope_scaling": None, "rope_theta": 5e5},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "sliding_window": 8},
        {"architectures": None, "hidden_act": "swish", "pretraining_tp": 2, "unheard_of": 1},
    ],
    ids=str,
)
def test_what_has_no_effect_is_no_obstacle(changes: dict[str, Any], tiny_corpus: TinyCorpus, tmp_path: Path):
    heads = {f"model.layers.{layer}.self_attn.{name}_norm.weight": torch.ones(8) for layer in range(3) for name in "qk"}
    extra = heads if changes.get("model_type") == "qwen3" else {}
    folder = write_llama(tmp_path / "folder", tiny_corpus.tokenizer, changes, extra)
    assert main(["--from", str(folder), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model.n_layers=4",), ["model.n_layers=4", "must be 3", "argument model.n_layers=4"]),
        (("model.norm=layernorm",), ["model.norm=layernorm", "rmsnorm"]),
        (("run.dir=elsewhere",), ["run.dir=elsewhere"]),
        (("data.seq_len=64",), ["model.max_seq_len=32", "data.seq_len=64"]),
        (("train.stpes=4",), ["unknown key train.stpes"]),
        (("--method", "post_nl"), ["model.method=post_nl", "did you mean post_ln?"]),
        (("--method", "post_ln"), ["--method post_ln", "placement post", "use one of pre_ln"]),
        (("--method", "deepscalelm_pre", "model.deepscale.k=3"), ["model.deepscale.k=3.0 with model.n_layers=3"]),
        (("--method", "deepscalelm_pre", "model.deepscale.norm_eps=fixed", "model.deepscale.k=1"), ["norm_eps=fixed"]),
        (("--method", "sigma_reparam", "model.sigma.gamma=one", "model.init=xavier"), ["reparam sigma"]),
        (("--tokenizer", "/nowhere.model"), ["--tokenizer", "/nowhere.model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_arguments_that_contradict_the_folder(arguments: tuple[str, ...], words, refused, tiny_corpus, tmp_path: Path):
    said = refused(write_llama(tmp_path / "folder", tiny_corpus.tokenizer), *arguments)
    assert all(word in said for word in words), said


def test_a_tokenizer_that_does_not_fit(refused, tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    pieces = load_tokenizer(tiny_corpus.tokenizer).pieces
    small = {name: each[: pieces - 9] for name, each in llama_tensors(pieces).items() if each.shape[0] == pieces}
    few = write_llama(tmp_path / "few", tiny_corpus.tokenizer, {"vocab_size": pieces - 9}, small)
    assert f"has {pieces} pieces" in refused(few) and f"{pieces - 9} rows" in refused(few)
    (folder / "tokenizer.model").unlink()
    assert "--tokenizer" in refused(folder)
    (folder / "tokenizer.model").write_bytes(b"nothing")
    assert "is not a SentencePiece model" in refused(folder)


def hostile_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def header(folder: Path, changed: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of the safetensors file and leaves its tensors."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found = json.loads(content[8 : 8 + length])
    changed(found)
    text = json.dumps(found).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def weights_are_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 3000)


def config_is_a_fifo(folder: Path) -> None:
    no_config(folder)
    os.mkfifo(folder / "config.json")


def weights_are_a_fifo(folder: Path) -> None:
    no_weights(folder)
    os.mkfifo(folder / "model.safetensors")


def huge_config(folder: Path) -> None:
    with open(folder / "config.json", "ab") as file:
        file.truncate(5 << 20)


def longer_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + content[8:])


def lying_offsets(folder: Path) -> None:
    def changed(found: dict[str, Any]) -> None:
        found["model.norm.weight"]["data_offsets"] = [0, 1 << 40]

    header(folder, changed)


def lying_shape(folder: Path) -> None:
    def changed(found: dict[str, Any]) -> None:
        found["model.embed_tokens.weight"]["shape"] = [1 << 40, 1 << 22]

    header(folder, changed)


def integers(folder: Path) -> None:
    tensors = llama_tensors(8)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, folder / "model.safetensors")


def not_finite(folder: Path) -> None:
    tensors = llama_tensors(json.loads((folder / "config.json").read_text())["vocab_size"])
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = torch.inf
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_config, ["is no model", "config.json"]),
        (no_weights, ["is no model", "model.safetensors"]),
        (weights_are_a_pickle, ["pytorch_model.bin", "pickle", "safetensors"]),
        (cut_off, ["not a complete safetensors file"]),
        (config_is_a_fifo, ["config.json", "not a regular file"]),
        (weights_are_a_fifo, ["model.safetensors", "not a regular file"]),
        (huge_config, ["config.json", "larger than 4 MiB"]),
        (longer_header, ["not a complete safetensors file"]),
        (lying_offsets, ["not a complete safetensors file"]),
        (lying_shape, ["not a complete safetensors file"]),
        (integers, ["dtype I8", "quantised"]),
        (not_finite, ["model.layers.2.mlp.down_proj.weight", "not finite"]),
        (lambda f: (f / "config.json").write_text("[]"), ["not a JSON object"]),
        (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), ["'a' is given twice"]),
        (lambda f: (f / "config.json").write_text("{" * 99999), ["config.json"]),
        (lambda f: hostile_index(f, {"a": "../folder/part.safetensors"}), ["../folder/part.safetensors"]),
        (lambda f: hostile_index(f, {"a": "/etc/passwd"}), ["/etc/passwd"]),
        (lambda f: hostile_index(f, {"a": "config.json"}), ["'config.json'", "not a safetensors file"]),
        (lambda f: hostile_index(f, {"a": "gone.safetensors"}), ["gone.safetensors does not exist"]),
        (lambda f: hostile_index(f, {"a": "part.safetensors"}), ["not in their files (a)"]),
        (lambda f: hostile_index(f, {"a": 1}), ["weight_map"]),
        (lambda f: hostile_index(f, None), ["weight_map"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_or_hostile_folder(harm, words: list[str], refused, tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    harm(folder)
    said = refused(folder)
    assert all(word in said for word in words), said


def test_what_is_there_already_stays(refused, tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    assert f"--out {tmp_path / 'other'} exists" in refused(folder, out=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["note.txt"]
    assert "is not a directory" in refused(tmp_path / "nowhere")


def test_the_program_says_how_to_go_on(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    done = run("import_model", "--from", str(folder), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"--config {tmp_path / 'run'}/config.yaml run.dir=... data.path=... train.steps=..." in done.stdout
    assert "llama, 3 layers x 16" in done.stdout and not done.stderr.strip()
