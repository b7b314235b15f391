"""A method of one file, named by import path: trains, resumes on other engines, is probed, planned, asked for export.

The file is what docs/methods/adding.md explains piece by piece; it defines an axis value on three axes and its options.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from support.programs import TINY, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.key import ABOVE_0, key
from stablelm.methods import catalogue
from stablelm.methods.axes import Added, Maps, Method, MethodOptions, Model, Placement, Reparam, Stream, ValueMixing
from stablelm.methods.sizes import parameter_counts
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import decays, initialise, roles
from stablelm.probe.predict import predict

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.methods.axes import Chunks


@dataclass(frozen=True)
class TwoStreamsOptions(MethodOptions):
    """Options of the stream of two tensors."""

    keep: float = key(1.0, "start of a tensor's share of itself", identity=True, range=ABOVE_0)


@dataclass(frozen=True)
class TwoStreams(Stream):
    """Hyper-connections of width 2 (Zhu et al., ICLR 2025, static form): two tensors, mixed by learned matrices."""

    name: ClassVar[str] = "two_streams"
    predicted: ClassVar[bool] = False

    def in_sublayer(self, model: Model, sublayer: int) -> tuple[Added, ...]:
        keep = model.option(TwoStreamsOptions).keep
        return (
            Added("reading", np.eye(2)[sublayer % 2]),
            Added("mixing", keep * np.eye(2)),
            Added("writing", np.ones(2)),
        )

    def start(self, embedded: "Tensor") -> "Chunks":
        return (embedded, embedded.clone())

    def read(self, chunks: "Chunks", added: Mapping[str, "Tensor"]) -> "Tensor":
        first, second = added["reading"].to(chunks[0].dtype).unbind()
        return first * chunks[0] + second * chunks[1]

    def write(self, chunks: "Chunks", branch: "Tensor", added: Mapping[str, "Tensor"]) -> "Chunks":
        dtype = chunks[0].dtype
        mixing, writing = added["mixing"].to(dtype), added["writing"].to(dtype)
        branch = branch.to(dtype)
        return tuple(mixing[i, 0] * chunks[0] + mixing[i, 1] * chunks[1] + writing[i] * branch for i in range(2))

    def finish(self, chunks: "Chunks") -> "Tensor":
        return (chunks[0] + chunks[1]) / math.sqrt(2)

    def export_obstacle(self, model: Model) -> str:
        return "its stream is two tensors, which no standard architecture has"


@dataclass(frozen=True)
class UnitRows(Reparam):
    """Rows of every matrix of the layers are brought back to length 1 after each optimizer step."""

    name: ClassVar[str] = "unit_rows"
    after_step: ClassVar[bool] = True

    def applies(self, model: Model, sublayer: int) -> bool:
        return True

    def update(self, matrices: Sequence[Any], reduce: Any) -> "list[Tensor]":
        from stablelm.methods.spectral import squared_rows

        return [squares.clamp(min=1e-30).rsqrt() for squares in squared_rows(matrices, reduce)]


NORMS = Placement("in_and_out", before_body=True, on_branch=True, final=True, by_depth=True)
METHOD = Method(
    "two_streams",
    "Zhu et al., Hyper-Connections, ICLR 2025",
    {"stream": "two_streams", "placement": "in_and_out", "reparam": "unit_rows"},
    (TwoStreams(), NORMS, UnitRows()),
    (TwoStreamsOptions,),
)

# What a user writes, and where Python finds the file.
NAMED = ("model.method=test_own_method:METHOD", "model.method_options={keep: 0.9}")
HERE = Path(__file__).parent
FOUND: dict[str, Any] = {"PYTHONPATH": ":".join(map(str, (REPOSITORY, HERE.parent, HERE))), "launcher": "python"}
STEPS = 6


def resolved(*overrides: str) -> ModelConfig:
    config = load([], [*NAMED, "model.n_layers=3", "model.d_model=32", "model.n_heads=2", "train.steps=1", *overrides])
    return resolve(config.config, pieces=300, world_size=1, accelerate_precision=None).model


def test_the_model_is_the_methods():
    model = resolved()
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    found = dict(decoder.named_parameters())
    assert torch.equal(found["layers.1.feedforward.reading"], torch.tensor([0.0, 1.0]))
    assert torch.equal(found["layers.1.feedforward.mixing"], 0.9 * torch.eye(2))
    assert sum(parameter.numel() for parameter in found.values()) == parameter_counts(model)["total"]
    decayed = {role.kind for role in roles(decoder).values() if decays(role)}
    assert decayed == {"head"}  # a reparametrised matrix has no size to decay


def test_it_generates_with_a_cache_like_the_whole_sequence():
    import torch

    from stablelm.model.attention.cache import KeyValueCache
    from stablelm.model.decoder import Decoder
    from stablelm.model.initialise import initialise

    model = resolved()
    decoder = Decoder(model, "fp32").eval()
    initialise(decoder, model, 0)
    tokens = torch.arange(24).reshape(2, 12)
    cache = KeyValueCache(model, 2)
    with torch.no_grad():
        found = torch.cat([decoder(piece, cache=cache) for piece in tokens.split([5, 1, 6], dim=1)], dim=1)
        torch.testing.assert_close(found, decoder(tokens), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class QuarterOfFirst(ValueMixing):
    """A quarter of the first layer's values, in place of the half that the key means elsewhere."""

    name: ClassVar[str] = "quarter_of_first"
    share: ClassVar[float | None] = 0.25

    def asked(self, model: Model) -> bool:
        return bool(model.attention.value_residual)

    def mix(self, own: "Tensor", first: "Tensor", added: Mapping[str, "Tensor"]) -> "Tensor":
        return 0.75 * own + 0.25 * first


@dataclass(frozen=True)
class QuarterRank(Maps):
    """Maps of a quarter of the width in models of an even number of layers."""

    name: ClassVar[str] = "quarter_rank"

    def asked(self, model: Model) -> bool:
        return model.n_layers % 2 == 0

    def rank(self, model: Model) -> int:
        return model.d_model // 4


ATTENTION = Method("attention", "ours", {"attention.value_residual": True}, (QuarterOfFirst(), QuarterRank()))


@pytest.mark.parametrize(
    ("overrides", "mixing", "maps"),
    [
        ([], QuarterOfFirst(), "whole"),
        (["model.attention.value_residual=false", "model.n_layers=4"], "own", QuarterRank()),
        (["model.attention.low_rank=0.5"], QuarterOfFirst(), "low_rank"),
    ],
)
def test_value_mixing_and_maps_are_the_methods_where_the_keys_ask_for_them(overrides, mixing, maps):
    model = resolved("model.method=test_own_method:ATTENTION", "model.method_options={}", *overrides)
    found = model.axes
    assert mixing in (found.value_mixing, found.value_mixing.name)
    assert maps in (found.maps, found.maps.name)
    tokens = torch.arange(8)[None]
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    assert decoder(tokens).isfinite().all()
    assert predict(model, seq_len=8).stream_variance.shape == (model.n_layers + 1,)


def test_it_cannot_be_exported_and_says_why():
    assert catalogue.export_obstacles(resolved()) == ["its stream is two tensors, which no standard architecture has"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.method=test_own_method:NORMS", "model.method=test_own_method:NORMS is a Placement, not a method"),
        ("model.method=test_own_method:METHODS", "does not define METHODS"),
        ("model.method=nowhere.at_all:METHOD", "cannot be imported"),
        ("model.method_options={kept: 0.9}", "model.method_options: unknown option kept; it has keep"),
        ("model.method_options={keep: 0}", "model.method_options: keep=0 must be above 0"),
        ("model.method_options={keep: much}", "model.method_options: keep=much must be a number"),
        ("model.method=pre_ln", "model.method_options={'keep': 0.9} belongs to methods named by import path"),
        ("model.stream=two_stream", "model.stream=two_stream must be residual,"),
    ],
)
def test_what_is_wrong_is_said(override: str, words: str):
    with pytest.raises(ConfigError) as error:
        resolved(override)
    assert words in str(error.value)


@pytest.mark.slow
def test_it_trains_and_resumes_on_every_engine(tiny_corpus: TinyCorpus, tmp_path: Path):
    """fsdp2 on two ranks, zero3 on two, then one process; the same losses as an undisturbed run."""
    from stablelm.observe.sinks import last_records

    line = [*NAMED, *TINY, *tiny_corpus.overrides(), f"train.steps={STEPS}", "train.lr=1e-3", "train.warmup_steps=0"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("pretrain", *line, f"run.dir={whole}", **FOUND)
    assert done.returncode == 0, done.stderr
    for kind, processes, stop in (("fsdp2", 2, "2"), ("zero3", 2, "4"), ("single", 1, "null")):
        options = [f"run.dir={cut}", f"engine.kind={kind}", f"run.stop_after={stop}"]
        started: dict[str, Any] = FOUND | ({"launcher": "torchrun"} if processes > 1 else {})
        done = run("pretrain", *line, *options, processes=processes, **started)
        assert summary(cut)["exit_code"] == (0 if stop == "null" else 75), done.stderr
    expected, found = (last_records(path / "metrics.jsonl") for path in (whole, cut))
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        assert found[step]["loss"] == pytest.approx(record["loss"], rel=1e-6), step
    lengths = row_lengths(cut)
    assert len(lengths) == 3 * 6
    assert all(length == pytest.approx(1, abs=1e-5) for length in lengths.values())


def row_lengths(run_dir: Path) -> dict[str, float]:
    """The length of the longest row of each matrix of the layers in the last checkpoint."""
    from safetensors.torch import load_file

    (folder,) = list((run_dir / "checkpoints").glob(f"step-{STEPS:08d}"))
    tensors = {name: value for file in folder.glob("tensors/*.safetensors") for name, value in load_file(file).items()}
    matrices = {name: value for name, value in tensors.items() if name.startswith("model.layers.") and "body" in name}
    return {name: value.norm(dim=1).max().item() for name, value in matrices.items() if value.ndim == 2}


def test_it_is_probed_without_predictions_and_planned(tiny_corpus: TinyCorpus, tmp_path: Path):
    config = tmp_path / "own.yaml"
    config.write_text(
        "model: {method: test_own_method:METHOD, n_layers: 3, d_model: 32, n_heads: 2}\n"
        f"data: {{path: [{tiny_corpus.train}], tokenizer: {tiny_corpus.tokenizer}, seq_len: 32, lanes: 12}}\n"
        "train: {steps: 10, global_batch_size: 8}\n"
    )
    probed = run("probe", "--config", str(config), "--out", str(tmp_path / "probe"), **FOUND)
    assert probed.returncode == 0, probed.stderr
    layers = json.loads((tmp_path / "probe" / "probe.json").read_text())["layers"]
    assert [layer["stream_variance"]["predicted"] for layer in layers] == [None] * 4
    assert all(layer["gradient_norm"]["measured"] > 0 for layer in layers)
    planned = run("plan", "--config", str(config), "--world-size", "2", **FOUND)
    assert planned.returncode == 0, planned.stderr
    assert "parameters" in planned.stdout


@dataclass(frozen=True)
class Remembered(Reparam):
    """A buffer alone beside every matrix: its Frobenius norm at the start."""

    name: ClassVar[str] = "remembered"

    def applies(self, model: Model, sublayer: int) -> bool:
        return sublayer % 2 == 1

    def buffers(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"size": (1,)}

    def starts(self, weight: "Tensor", model: Model, top: Any) -> "dict[str, Tensor]":
        return {"size": weight.double().norm().reshape(1)}


REMEMBERED = Method("remembered", "none", {"reparam": "remembered"}, (Remembered(),))


def test_a_buffer_beside_a_matrix_has_its_start():
    from stablelm.model.decoder import Decoder
    from stablelm.model.initialise import initialise

    model = resolved("model.method=test_own_method:REMEMBERED", "model.method_options={}")
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    sizes = {name: buffer.item() for name, buffer in decoder.named_buffers()}
    assert len(sizes) == 3 * 2  # of the feed-forwards' matrices alone
    for name, size in sizes.items():
        assert size == pytest.approx(decoder.get_parameter(name.replace(".size", ".weight")).norm().item(), rel=1e-6)
