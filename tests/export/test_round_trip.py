"""A public model that is imported and exported again is the same, and one of ours comes back as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import public_models, tokenizer_files
from support.programs import TINY, run
from support.tiny import TinyCorpus, synthetic_documents

from stablelm.evaluate.trained_run import load_module, open_run
from stablelm.export.importing.import_model import import_model
from stablelm.export.writer import ExportRequest, export
from stablelm.tokenizers.training import sample_lines, train_byte_level

EFFECTIVE = {
    "llama": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id"),
    ),
    "gpt2": (
        *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function", "layer_norm_epsilon"),
        *("tie_word_embeddings", "eos_token_id"),
    ),
}


def effective(folder: Path, kind: str) -> dict[str, Any]:
    """What of a config.json changes the function, its defaults filled in by transformers."""
    import transformers

    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    names = EFFECTIVE["gpt2" if kind == "gpt2" else "llama"]
    return {name: found.get(name, False) for name in (*names, "architectures", "model_type")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3", "gpt2"])
def test_import_and_export_give_the_folder_back(kind: str, dtype: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    model = public_models.make(kind, tiny_corpus.tokenizer)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    folder = public_models.save(model, tmp_path / "folder", tiny_corpus.tokenizer)
    import_model(folder, tmp_path / "run")
    done = export(ExportRequest(str(tmp_path / "run"), tmp_path / "out", dtype=dtype))
    assert done.format == kind.removesuffix("_tied")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert effective(folder, kind) == effective(tmp_path / "out", kind)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("method", ["deepscalelm_pre", "deepscalelm_sigma", "completep", "layernorm_scaling"])
def test_scales_that_were_divided_out_come_back(method: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    import transformers

    model = public_models.make("llama", tiny_corpus.tokenizer, rms_norm_eps=1e-3)
    folder = public_models.save(model, tmp_path / "folder", tiny_corpus.tokenizer)
    import_model(folder, tmp_path / "run", method=method)
    done = export(ExportRequest(str(tmp_path / "run"), tmp_path / "out", format="llama", dtype="fp32"))
    assert not any("gains make up" in note for note in done.notes)
    ids = torch.randint(0, model.config.vocab_size, (2, 60))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = public_models.logits_of(model, ids)
    torch.testing.assert_close(public_models.logits_of(again, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0"])
def test_a_run_is_written_as_gguf(dtype: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    import gguf

    folder = public_models.write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    import_model(folder, tmp_path / "run", method="deepscalelm_pre")
    arguments = ("--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    done = run("export", *arguments, "--format", "gguf", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {each.name: each for each in reader.tensors}
    assert len(found) == 3 + 3 * 9
    kept = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    values = gguf.quants.dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type)
    torch.testing.assert_close(torch.from_numpy(values.copy()), kept, atol=0.02, rtol=0)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == kept.shape[0]


@pytest.mark.slow
def test_a_byte_level_model_is_sampled_evaluated_exported_imported_and_trained_on(
    tiny_corpus: TinyCorpus, tmp_path: Path
):
    lines = [text for seed in range(3) for text in synthetic_documents(60, seed=seed)]
    content = train_byte_level(sample_lines(lines, 1000, seed=0, ends=True), vocab_size=320)
    tokenizer = tokenizer_files.write(tmp_path / "bpe", content) / "tokenizer.json"
    data = (f"data.path={tiny_corpus.train}", f"data.validation_path={tiny_corpus.validation}")
    model = ("model.norm=rmsnorm", "model.activation=swiglu")
    done("pretrain", *TINY, *model, *data, f"data.tokenizer={tokenizer}", f"run.dir={tmp_path / 'first'}")
    first = sampled_and_evaluated(tmp_path / "first", tiny_corpus)

    done("export", "--checkpoint", str(tmp_path / "first"), "--out", str(tmp_path / "out"), "--dtype", "fp32")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    shaped = [each for each in TINY if not each.startswith("model.")]
    done("import_model", "--from", str(tmp_path / "out"), "--out", str(tmp_path / "back"), *shaped)
    before, after = (load_module(open_run(str(tmp_path / name))) for name in ("first", "back"))
    torch.testing.assert_close(dict(after.named_parameters()), dict(before.named_parameters()), rtol=0, atol=0)
    assert json.loads((tmp_path / "back" / "imported.json").read_text())["model_type"] == "llama"
    assert sampled_and_evaluated(tmp_path / "back", tiny_corpus) == first

    again = ("train.lr=1e-2", "train.warmup_steps=2", f"run.dir={tmp_path / 'second'}")
    done("pretrain", "--config", str(tmp_path / "back" / "config.yaml"), *data, *again, processes=2)
    _, bits = sampled_and_evaluated(tmp_path / "second", tiny_corpus)
    assert 0 < bits < first[1] - 0.5


def sampled_and_evaluated(folder: Path, corpus: TinyCorpus) -> tuple[str, float]:
    """The likeliest continuation of a prompt, and the bits per byte of the validation text."""
    texts, scores = folder.with_suffix(".jsonl"), folder.with_suffix(".json")
    greedy = ("--prompt", "ban der", "--temperature", "0", "--max-new-tokens", "12", "--out", str(texts))
    done("generate", "--checkpoint", str(folder), *greedy)
    done("eval", "--checkpoint", str(folder), "--data", corpus.validation, "--out", str(scores))
    [found] = json.loads(scores.read_text())["sets"].values()
    return json.loads(texts.read_text())["text"], found["bits_per_byte"]


def done(program: str, *arguments: str, processes: int = 1) -> None:
    ended = run(program, *arguments, processes=processes)
    assert ended.returncode == 0, ended.stderr
