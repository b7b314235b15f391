"""The step of every method and option on a simulated GPU: the host does not wait, no tensors of two devices meet."""

from collections import Counter
from collections.abc import Sequence

import pytest
from simulated_gpu.conftest import Simulator
from simulated_gpu.recorder import Record

from stablelm.methods.catalogue import METHODS

STEP = ("forward", "backward", "update", "exchange")
SHAPE = (4, 64)
"""Rows and tokens of a step on a rank, of `simulation.SMALL`."""
FLOAT8 = ["train.float8_min_width=128"]
OPTIONS = {
    "fp32": ["train.precision=fp32"],
    "bf16 stream": ["model.stream_dtype=bf16"],
    "one micro-batch": ["train.micro_batch_size=4"],
    "dropout": ["model.dropout=0.1"],
    "tied head": ["model.tie_embeddings=true"],
    "z-loss": ["train.z_loss=1e-4"],
    "own loss": ["train.loss=simulated_gpu.own_loss:focal"],
    "no clipping": ["train.grad_clip=0"],
    "biases": ["model.bias=true"],
    "norm of the embedding": ["model.embedding_norm=true"],
    "layernorm": ["model.norm=layernorm"],
    "dyt": ["model.norm=dyt"],
    "relu": ["model.activation=relu"],
    "gelu_tanh": ["model.activation=gelu_tanh"],
    "swiglu": ["model.activation=swiglu"],
    "grouped queries": ["model.kv_heads=1"],
    "qk_norm": ["model.attention.qk_norm=true"],
    "logit cap": ["model.attention.logit_cap=30"],
    "logit cap of grouped queries": ["model.attention.logit_cap=30", "model.kv_heads=1"],
    "learned positions": ["model.attention.position=learned"],
    "no positions": ["model.attention.position=none"],
    "float8": [*FLOAT8, "train.float8=tensorwise"],
    "float8 by rows, with sigma and recompute": [
        *(*FLOAT8, "train.float8=rowwise", "model.method=magneto_sigma", "engine.recompute=selective"),
    ],
    "float8 under fsdp2": [*FLOAT8, "train.float8=tensorwise", "engine.kind=fsdp2", "ranks=8"],
    "recompute": ["engine.recompute=full"],
    "recompute with dropout": ["engine.recompute=full", "model.dropout=0.1"],
    "ddp": ["engine.kind=ddp", "ranks=2"],
    "fsdp2": ["engine.kind=fsdp2", "ranks=8", "engine.unit_bytes=100000"],
    "fsdp2 with sigma": ["engine.kind=fsdp2", "ranks=8", "model.method=magneto_sigma"],
    "fsdp2 with recompute": ["engine.kind=fsdp2", "ranks=4", "engine.recompute=full"],
    "hsdp": ["engine.kind=hsdp", "ranks=8"],
}
BIASED = {
    "alibi": ["model.attention.position=alibi"],
    "alibi and grouped queries": ["model.attention.position=alibi", "model.kv_heads=1"],
    "e_spa": ["model.method=e_spa", "model.n_layers=3"],
    "documents": ["data.document_mask=true"],
    "documents and grouped queries": ["data.document_mask=true", "model.kv_heads=1"],
    "documents and alibi": ["data.document_mask=true", "model.attention.position=alibi"],
    "documents and learned positions": ["data.document_mask=true", "model.attention.position=learned"],
    "documents and logit cap": ["data.document_mask=true", "model.attention.logit_cap=30"],
    "documents and layers": ["data.document_mask=true", "observe.layers_every=1"],
}
FLEX = {
    "alibi and grouped queries": ["model.attention.position=alibi", "model.kv_heads=1"],
    "logit cap": ["model.attention.logit_cap=30"],
    "e_spa": ["model.method=e_spa", "model.n_layers=3"],
    "documents in fp32": ["data.document_mask=true", "train.precision=fp32"],
    "documents and alibi": ["data.document_mask=true", "model.attention.position=alibi"],
    "documents and fsdp2": ["data.document_mask=true", "train.precision=fp32", "engine.kind=fsdp2", "ranks=8"],
    "alibi and fsdp2": ["model.attention.position=alibi", "engine.kind=fsdp2", "ranks=8"],
}
OFFLOADED = {
    "pre_ln": ["model.method=pre_ln"],
    "sigma": ["model.method=deepscalelm_sigma", "model.n_layers=3"],
    "without norms": ["model.method=rezero"],
    "no clipping": ["train.grad_clip=0"],
}


@pytest.fixture
def record(simulator: Simulator):
    from simulated_gpu import simulation

    return lambda *overrides: simulator(simulation.simulate, *overrides)


FACTORS = (3, 2)


def check(found: Record, once: Sequence[tuple[int, ...]] = ()) -> None:
    """No waits in the step, and the batch is all that is copied, but for the factors of drawn layers and what of
    these shapes is sent in the first pass, `once`."""
    assert not [wait for wait in found.waits if wait.phase in STEP]
    sent = [copy for copy in found.copies.elements() if copy.phase in STEP[:3] and copy.shape != FACTORS]
    assert {(copy.phase, copy.to_device) for copy in sent} == {("forward", True)}
    assert Counter(copy.shape for copy in sent) == Counter([SHAPE, SHAPE, *once])
    fetched = [(copy.to_device, copy.shape) for copy in found.copies.elements() if copy.phase == "exchange"]
    assert fetched == [(False, (4,))]
    assert all(found.count(phase) for phase in STEP)


@pytest.mark.parametrize("method", METHODS)
def test_methods(record, method: str):
    """Planned attention is kept on the device: the bias and the factors of the rows of each layer are sent once."""
    is_planned = METHODS[method].defaults.get("attention.shaping") in {"espa", "uspa"}
    once = [(64, 64), (64,)] * 3 if is_planned else []
    check(record(f"model.method={method}", "model.n_layers=3", "train.micro_batch_size=4"), once)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(record, option: str):
    check(record(*OPTIONS[option]))


@pytest.mark.parametrize("option", BIASED)
def test_biases_and_documents(record, option: str):
    """Borders of documents may come from the host with each micro-batch."""
    found: Record = record(*BIASED[option])
    assert not [wait for wait in found.waits if wait.phase in STEP]
    assert all(copy.to_device and copy.phase == "forward" for copy in found.copies if copy.phase in STEP[:3])


@pytest.mark.parametrize("option", FLEX)
def test_flex_attention(simulator: Simulator, option: str):
    """The mask is made of the batch on the device, once a micro-batch."""
    from simulated_gpu import simulation

    found: Record = simulator(simulation.simulate_with_triton, *FLEX[option])
    assert not [wait for wait in found.waits if wait.phase in STEP]
    assert found.attention() == {"flex_attention", "flex_attention_backward"}


@pytest.mark.parametrize("option", OFFLOADED)
def test_offloaded_parameters(record, option: str):
    """The host updates them: it waits for the gradients in the backward pass, and once for their norm."""
    found: Record = record("engine.kind=fsdp2", "ranks=8", "engine.offload=parameters", *OFFLOADED[option])
    waits = {wait: count for wait, count in found.waits.items() if wait.phase in STEP}
    assert {(wait.phase, wait.what) for wait in waits if wait.phase != "update"} == {("backward", "an event")}
    assert [(wait.what, n) for wait, n in waits.items() if wait.phase == "update"] == [
        ("blocking copy cuda to cpu ()", 1)
    ]


@pytest.mark.parametrize(
    "options", [["model.method=magneto_sigma"], ["engine.kind=fsdp2", "ranks=4", "engine.offload=parameters"]]
)
def test_measuring_layers_fetches_as_often_at_any_depth(record, options: list[str]):
    def fetches(depth: int) -> int:
        found: Record = record(f"model.n_layers={depth}", "observe.layers_every=1", *options)
        waits = {wait: n for wait, n in found.waits.items() if wait.phase == "observe"}
        return sum(n for wait, n in waits.items() if wait.what != "an event")

    assert fetches(1) == fetches(2) < 20
