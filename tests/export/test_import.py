"""A folder that transformers made becomes a run whose model computes the same, under every method that can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import public_models, tokenizer_files
from support.disks import small_files
from support.public_models import KINDS, POSITIONS
from support.tiny import TinyCorpus

from stablelm.checkpoint.reader import Reader
from stablelm.checkpoint.tensor_index import read_index
from stablelm.errors import StorageError
from stablelm.evaluate.trained_run import load_module, open_run
from stablelm.export.importing import import_scales
from stablelm.export.importing.import_model import import_model
from stablelm.export.writer import ExportRequest, export
from stablelm.methods import catalogue

FITTING = (
    *("pre_ln", "gpt2", "deepscalelm_pre", "sigma_reparam", "layernorm_scaling", "completep", "denseformer"),
    *("deepscalelm_sigma", "hyper_connections", "mhc", "layerscale", "scaled_embed", "wesar"),
    "layer_drop",
)


@pytest.fixture(scope="session")
def folders(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory):
    """kind -> (folder, ids, logits of transformers), each made at its first use."""
    root, made = tmp_path_factory.mktemp("public"), {}

    def of(kind: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        if kind not in made:
            model = public_models.make(kind, tiny_corpus.tokenizer)
            shards = {"max_shard_size": "60KB"} if kind == "qwen2" else {}
            folder = public_models.save(model, root / kind, tiny_corpus.tokenizer, **shards)
            ids = torch.randint(0, model.config.vocab_size, (2, POSITIONS))
            made[kind] = folder, ids, public_models.logits_of(model, ids)
        return made[kind]

    return of


def logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    module = load_module(open_run(str(run)))
    with torch.no_grad():
        return module(ids) @ module.head_weight().T


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(kind: str, folders, tmp_path: Path):
    folder, ids, expected = folders(kind)
    made = import_model(folder, tmp_path / "run")
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)
    assert bool(made.added) == (kind in ("llama_biased", "qwen2"))
    assert (folder / "model.safetensors.index.json").exists() == (kind == "qwen2")


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", FITTING)
def test_the_logits_stay_the_same_under_a_method_whose_scales_divide_out(
    method: str, kind: str, folders, tmp_path: Path
):
    folder, ids, expected = folders(kind)
    made = import_model(folder, tmp_path / "run", method=method)
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)
    assert made.config.model.method == method
    own = catalogue.apply_method(catalogue_model(method)).axes
    held = made.config.model.axes
    assert (held.stream, held.placement, held.reparam, held.init) == (own.stream, own.placement, own.reparam, own.init)


def catalogue_model(method: str) -> Any:
    from stablelm.config.schema import ModelConfig

    return ModelConfig(method=method)


def test_a_gain_that_starts_at_zero_is_one_where_branches_must_count(folders, tmp_path: Path):
    folder, ids, expected = folders("llama")
    import_model(folder, tmp_path / "run", method="rezero", overrides=["model.placement=pre"])
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)


def test_separate_norms_start_alike_and_a_network_that_is_still_silent_can_learn(folders, tmp_path: Path):
    folder, ids, expected = folders("qwen3")
    import_model(folder, tmp_path / "run", method="muddformer")
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)
    module = load_module(open_run(str(tmp_path / "run")))
    first, last = (module.get_parameter(f"layers.0.mix_{name}") for name in ("hidden", "out"))
    assert first.std().item() == pytest.approx(first.shape[1] ** -0.5, rel=0.1)
    assert not last.any()


def test_every_method_fits_or_says_why_not():
    model = catalogue_model("pre_ln")
    fits = import_scales.fitting_methods(model, norms_of_heads=False)
    assert set(FITTING) == set(fits)
    for name in catalogue.METHODS:
        reasons = import_scales.obstacles(import_scales.for_import(model.changed(method=name)), norms_of_heads=False)
        assert bool(reasons) == (name not in fits), name


@pytest.mark.parametrize("size", [100, 40_000])
def test_a_full_disk_is_said_in_terms_of_an_import(size: int, tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = public_models.write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    with pytest.raises(StorageError) as error, small_files(size):
        import_model(folder, tmp_path / "run")
    assert str(error.value).endswith("File too large): free space there or name another --out")
    assert str(tmp_path / "run") in str(error.value) and "checkpoint.keep" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_small_eps_matters_and_is_kept(folders, tiny_corpus: TinyCorpus, tmp_path: Path):
    """A stream as small as eps, where norms of one eps at every depth would be far off under deepscalelm."""
    model = public_models.make("llama", tiny_corpus.tokenizer, rms_norm_eps=1e-2)
    folder = public_models.save(model, tmp_path / "folder", tiny_corpus.tokenizer)
    ids = torch.randint(0, model.config.vocab_size, (2, POSITIONS))
    import_model(folder, tmp_path / "run", method="deepscalelm_pre")
    expected = public_models.logits_of(model, ids)
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_fp32_masters_bit_by_bit(dtype, tiny_corpus: TinyCorpus, tmp_path: Path):
    tensors = {
        name: tensor.to(dtype) for name, tensor in public_models.llama_tensors(_pieces(tiny_corpus.tokenizer)).items()
    }
    folder = public_models.write_llama(tmp_path / "folder", tiny_corpus.tokenizer, tensors=tensors)
    made = import_model(folder, tmp_path / "run")
    found = _tensors(tmp_path / "run")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    query = found["model.layers.1.attention.body.query.weight"]
    assert torch.equal(query, tensors["model.layers.1.self_attn.q_proj.weight"].float())
    (held,) = json.loads((made.path / "imported.json").read_text())["dtypes"]
    assert held == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def test_a_model_saved_without_its_head_is_found_by_its_names(tiny_corpus: TinyCorpus, tmp_path: Path):
    model = public_models.make("gpt2", tiny_corpus.tokenizer)
    folder = public_models.save(model.transformer, tmp_path / "folder", tiny_corpus.tokenizer)
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    import_model(folder, tmp_path / "run")
    expected = public_models.logits_of(model, ids)
    torch.testing.assert_close(logits(tmp_path / "run", ids), expected, atol=1e-5, rtol=0)


def test_what_the_source_leaves_open_is_the_users(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder = public_models.write_llama(tmp_path / "folder", tiny_corpus.tokenizer)
    overrides = ["train.steps=7", "model.max_seq_len=16", "model.dropout=0.1", "train.precision=fp64"]
    made = import_model(folder, tmp_path / "run", overrides=overrides)
    assert made.config.train.steps == 7
    assert made.config.data.seq_len == 16
    opened = open_run(str(tmp_path / "run"))
    assert opened.config.model.dropout == 0.1
    assert load_module(opened).embedding.weight.dtype == torch.float64
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == Path(tiny_corpus.tokenizer).read_bytes()


def _pieces(tokenizer: str) -> int:
    from stablelm.tokenizers import load_tokenizer

    return load_tokenizer(tokenizer).pieces


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    directory = run / "checkpoints" / "step-00000000" / "tensors"
    index = read_index(directory)
    return {name: Reader(directory, index).tensor(name) for name in index.tensors}


@pytest.mark.parametrize("form", ["gpt2", "llama3"])
def test_documents_begin_with_bos_where_the_tokenizer_puts_one(form: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    content = getattr(tokenizer_files, form)()
    (tmp_path / "tokenizer.json").write_bytes(content)
    folder = public_models.write_llama(tmp_path / "folder", str(tmp_path / "tokenizer.json"))
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    made = import_model(folder, tmp_path / "run")
    assert made.config.data.add_bos == (form == "llama3")
    assert open_run(str(tmp_path / "run")).tokenizer.add_bos == made.config.data.add_bos
    export(ExportRequest(str(tmp_path / "run"), tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    plain = import_model(folder, tmp_path / "plain", overrides=["data.add_bos=false"])
    assert not plain.config.data.add_bos
