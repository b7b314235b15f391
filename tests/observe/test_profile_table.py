"""The table of a profile: parts of real traces, and made ones of a GPU; what is suggested from which figures."""

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.matrix import configuration, run_steps
from support.programs import TINY, losses, run
from support.tiny import TinyCorpus

from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import Ranks
from stablelm.observe.profile import advice, parts
from stablelm.observe.profile.nodes import BACKWARD, read_nodes
from stablelm.observe.profile.parts import MARK, STEP, calls, marked
from stablelm.observe.profile.table import Limit, Profile, as_text
from stablelm.observe.profile.timeline import Timeline, read
from stablelm.observe.sinks import last_records

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)
GRADIENTS = {
    "ScaledDotProduct": parts.ATTENTION,
    "Gelu": parts.FEEDFORWARD,
    "NativeLayerNorm": parts.NORMS,
    "Embedding": parts.EMBEDDING,
    "_ChunkedCrossEntropy": parts.HEAD,
}


class Loader:
    def next(self) -> None: ...


def traced(path: Path, *overrides: str, steps: int = 1) -> list[dict[str, Any]]:
    """The events of steps of a small model after one without a trace."""
    config = configuration("model.method=pre_ln", "model.n_layers=2", "model.activation=gelu", *overrides)
    engine, loader = build_engine(config, "single", ALONE), Loader()
    run_steps(engine, ALONE, config, 1, 1)
    found = calls(engine, loader, compiled=config.train.compile is True)
    with marked(found), torch.profiler.profile(record_shapes=True) as profile:
        for step in range(2, 2 + steps):
            with torch.profiler.record_function(MARK + STEP):
                loader.next()
                run_steps(engine, ALONE, config, step, step, micro=4)
    assert not any(call.method in vars(call.owner) for call in found), "the marks are gone"
    profile.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_backward_pass_belongs_to_the_part_of_its_forward_pass(recompute: str, tmp_path: Path):
    nodes = read_nodes(traced(tmp_path / "trace.json", f"engine.recompute={recompute}"))
    found: dict[str, set[str]] = {}
    for node in nodes:
        for name in GRADIENTS:
            if node.name.startswith(BACKWARD + name):
                found.setdefault(name, set()).add(node.part)
    assert found == {name: {part} for name, part in GRADIENTS.items()}


def test_matmuls_count_the_flops_of_the_model(tmp_path: Path):
    """2 m n k of each, three passes: 6 a parameter of a matrix and token, beside the embedding's."""
    timeline = read(traced(tmp_path / "trace.json", steps=2), 2)
    config = configuration("model.method=pre_ln", "model.n_layers=2", "model.activation=gelu")
    model, tokens = config.model, config.train.batch_sizes.first * config.data.seq_len
    assert model.d_ff is not None and model.vocab_size is not None
    matrices = (
        model.n_layers * (4 * model.d_model**2 + 2 * model.d_model * model.d_ff) + model.vocab_size * model.d_model
    )
    assert timeline.flops == 2 * 6 * matrices * tokens
    assert 0 < timeline.matmul_time < sum(stop - start for start, stop in timeline.steps)


def covered(timeline: Timeline) -> bool:
    """Whether the stretches are the steps, each moment once."""
    ordered = sorted(timeline.stretches)
    gaps = sum(abs(after.start - before.stop) for before, after in pairwise(ordered))
    between = sum(b[0] - a[1] for a, b in pairwise(timeline.steps))
    ends = ordered[0].start == timeline.steps[0][0] and ordered[-1].stop == timeline.steps[-1][1]
    return ends and gaps == pytest.approx(between, abs=1e-3 * len(ordered))


def test_stretches_cover_the_steps_once(tmp_path: Path):
    timeline = read(traced(tmp_path / "trace.json", steps=2), 2)
    assert len(timeline.steps) == 2 and covered(timeline)
    assert {parts.EMBEDDING, parts.ATTENTION, parts.FEEDFORWARD, parts.NORMS, parts.HEAD, parts.OPTIMIZER} <= {
        each.part for each in timeline.stretches
    }


def profiled(corpus: TinyCorpus, folder: Path, *extra: str, processes: int = 1) -> tuple[list[dict], str]:
    settings = ("train.steps=5", "observe.profile=[3,4]", f"run.dir={folder}", *extra)
    done = run("pretrain", *TINY, *corpus.overrides(), *settings, processes=processes)
    assert done.returncode == 0, done.stderr
    tables = [folder / "profile" / f"table-rank{rank}-steps-3-4.json" for rank in range(processes)]
    return [json.loads(path.read_text()) for path in tables], done.stdout


def sums_up(table: dict) -> None:
    """The parts are the step, and so are the operators."""
    found = table["parts"]
    assert sum(found.values()) == pytest.approx(table["step_seconds"], rel=1e-6)
    assert sum(each["seconds"] for each in table["operators"].values()) == pytest.approx(
        table["step_seconds"], rel=1e-6
    )


def test_a_run_writes_the_table_and_prints_it_once(tiny_corpus: TinyCorpus, tmp_path: Path):
    (table,), out = profiled(tiny_corpus, tmp_path / "run")
    records = last_records(tmp_path / "run" / "metrics.jsonl")
    sums_up(table)
    # Two clocks, which part where other programs take the processor in between.
    recorded = sum(records[step]["step_seconds"] for step in (3, 4)) / 2
    assert table["step_seconds"] - table["parts"][parts.BETWEEN] == pytest.approx(recorded, rel=0.25, abs=0.02)
    text = (tmp_path / "run" / "profile" / "table-rank0-steps-3-4.txt").read_text()
    assert out.count("profile of steps 3 to 4, rank 0 of 1, cpu:") == 1 and "What to try:" in text
    for line in filter(None, text.splitlines()):
        assert line.rstrip() in out
    plain = run("pretrain", *TINY, *tiny_corpus.overrides(), "train.steps=5", f"run.dir={tmp_path / 'plain'}")
    assert plain.returncode == 0, plain.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "plain"), "a trace changes no loss"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero1", "zero3"])
def test_every_rank_of_an_engine_has_its_table(kind: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    tables, out = profiled(tiny_corpus, tmp_path / "run", f"engine.kind={kind}", processes=2)
    for rank, table in enumerate(tables):
        assert table["rank"] == rank and table["parts"][parts.COMMUNICATION] > 0
        sums_up(table)
    assert out.count("profile of steps") == 1


@pytest.mark.slow
def test_compiled_layers_are_one_part(tiny_corpus: TinyCorpus, tmp_path: Path):
    (table,), _ = profiled(tiny_corpus, tmp_path / "run", "train.compile=true")
    assert table["parts"][parts.COMPILED] > 0 and parts.ATTENTION not in table["parts"]


def event(name: str, start: float, stop: float, category: str = "user_annotation", **arguments: Any) -> dict[str, Any]:
    thread = 7 if category in ("kernel", "gpu_memcpy") else 1
    arguments = {key.replace("_", " "): value for key, value in arguments.items()}
    return {
        "ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": stop - start, "args": arguments
    }  # fmt: skip


def test_on_a_gpu_the_time_is_the_device_s():
    """A kernel of attention, an exchange half beside it, waiting for data and for the host."""
    shapes = {"Input_Dims": [[8, 4], [4, 16]]}
    events = [
        event(MARK + STEP, 0, 100),
        event(MARK + parts.WAIT, 0, 10),
        event(MARK + parts.ATTENTION, 10, 30),
        event("aten::mm", 11, 20, "cpu_op", **shapes),
        event("cudaLaunchKernel", 12, 13, "cuda_runtime", correlation=1),
        event("aten::add", 21, 25, "cpu_op"),
        event("cudaLaunchKernel", 22, 23, "cuda_runtime", correlation=2),
        event("FSDP::all_gather", 31, 40),
        event("cudaLaunchKernel", 32, 33, "cuda_runtime", correlation=3),
        event("gemm", 15, 55, "kernel", correlation=1),
        event("elementwise", 55, 60, "kernel", correlation=2),
        event("ncclDevKernel_AllGather", 40, 80, "kernel", correlation=3),
        event("cudaDeviceSynchronize", 90, 99, "cuda_runtime", correlation=4),
    ]
    timeline = read(events, 1)
    assert covered(timeline)
    spent: dict[str, float] = {}
    for start, stop, part, _ in timeline.stretches:
        spent[part] = spent.get(part, 0) + stop - start
    assert spent == {parts.WAIT: 10, parts.IDLE: 5 + 20, parts.ATTENTION: 45, parts.COMMUNICATION: 20}
    assert timeline.flops == 2 * 8 * 4 * 16 and timeline.matmul_time == 40
    assert timeline.calls == {"aten::mm": 1, "aten::add": 1}


def test_waiting_for_other_ranks_is_communication_on_a_cpu():
    other = {**event("gloo:all_reduce", 30, 50, "cpu_op"), "tid": 2}
    events = [
        event(MARK + STEP, 0, 60),
        event(MARK + parts.OPTIMIZER, 20, 60),
        event("aten::mul", 40, 45, "cpu_op"),
        other,
    ]
    spent = {(part, operator): stop - start for start, stop, part, operator in read(events, 1).stretches}
    assert sum(each for (part, _), each in spent.items() if part == parts.COMMUNICATION) <= 15
    total = [each for each in read(events, 1).stretches if each.part == parts.COMMUNICATION]
    assert sum(each.stop - each.start for each in total) == 15


def profile(matmul_rate: float = 0.7, **shares: float) -> Profile:
    """A step of one second with these shares by part, the rest attention."""
    named = {getattr(parts, name): share for name, share in shares.items()}
    named[parts.ATTENTION] = 1 - sum(named.values())
    return Profile(1, 1, 0, 1, "cpu", 1.0, named, {}, 0.5, 0.5 * matmul_rate * 1e9, 3e8, Limit(1e9, "the sheet"))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (profile(WAIT=0.06), "waiting for data takes 6% of the step: raise data.workers (now 1)"),
        (profile(COMMUNICATION=0.2), "communication takes 20% of the step"),
        (profile(OPTIMIZER=0.16), "the optimizer takes 16% of the step"),
        (profile(HEAD=0.31), "a vocabulary of 96 is large for 4 layers of width 32"),
        (profile(IDLE=0.16), "set train.compile=true, or raise train.micro_batch_size"),
        (profile(NORMS=0.3, OTHER=0.1), "train.compile=true joins small operators"),
        (profile(BETWEEN=0.2), "raise observe.every"),
        (profile(0.39), "matmuls run at 39% of the limit"),
    ],
)
def test_a_suggestion_follows_from_its_figure_alone(figures: Profile, words: str):
    (found,) = advice.suggestions(figures, configuration(), None)
    assert words in found


def test_nothing_stands_out_below_the_thresholds():
    usual = profile(WAIT=0.05, COMMUNICATION=0.15, OPTIMIZER=0.15, HEAD=0.3, NORMS=0.2, BETWEEN=0.05)
    assert advice.suggestions(usual, configuration(), None) == [advice.NOTHING]
    assert advice.suggestions(profile(0.0), configuration(), None) == [advice.NOTHING], "a trace without shapes"


def test_keys_that_a_suggestion_names_exist():
    from stablelm.config.keys import keys

    half = dict.fromkeys(("WAIT", "COMMUNICATION", "OPTIMIZER", "HEAD", "IDLE", "OTHER", "BETWEEN"), 0.4)
    config = configuration("engine.recompute=full")
    text = " ".join(advice.suggestions(profile(0.1, **half), config, 0.2))
    named = re.findall(
        r"\b(?:data|train|engine|observe|evaluate|checkpoint)\.[a-z_]+\b", text.replace("data/prepare.py", "")
    )
    assert len(named) > 10 and set(named) <= set(keys())


def test_a_part_of_the_table_is_a_line():
    text = as_text(dataclasses.replace(profile(WAIT=0.25), operators={"aten::mm": (0.5, 12)}), ["try this"])
    assert re.search(r"^data wait +250.00 +25.0%$", text, re.MULTILINE)
    assert re.search(r"^aten::mm +500.00 +50.0% +12$", text, re.MULTILINE)
    assert text.endswith("What to try:\n- try this\n")
