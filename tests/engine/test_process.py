"""What a rank's process is set to: variables, switches of torch, garbage collection, and when layers are compiled."""

import gc
import platform
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from stablelm.config.schema import Config, EngineConfig, TrainConfig
from stablelm.engine.process import compilation
from stablelm.engine.process.compilation import check_compile, obstacle, settled
from stablelm.engine.process.environment import in_words, recorded, set_variables, variables_kept
from stablelm.engine.process.torch_settings import GarbageCollection, repeats, set_switches, switches_kept
from stablelm.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DETERMINISTIC = Config(train=TrainConfig(deterministic=True))


@pytest.mark.parametrize("before", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "HOME": "/root"}])
def test_variables_are_put_back(before: dict[str, str]):
    environ = dict(before)
    with variables_kept(environ):
        set_variables(DETERMINISTIC, environ)
        environ["TORCHINDUCTOR_CACHE_DIR"] = "/tmp/compiled"
    assert environ == before


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_variables_of_the_user_stay(own: str):
    environ = {own: "backend:cudaMallocAsync", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    before = dict(environ)
    set_variables(DETERMINISTIC, environ)
    assert environ == before


def test_variables_that_are_set_and_said():
    environ: dict[str, str] = {"HOME": "/root"}
    set_variables(Config(), environ)
    assert recorded(environ) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    set_variables(DETERMINISTIC, environ)
    assert (
        in_words(environ) == "environment: PYTORCH_ALLOC_CONF=expandable_segments:True, CUBLAS_WORKSPACE_CONFIG=:4096:8"
    )


def test_switches_are_set_and_put_back():
    assert repeats(CPU) and not repeats(GPU)
    with switches_kept():
        engine: Any = EngineConfig(matmul_precision="high")
        set_switches(Config(engine=engine, train=TrainConfig(deterministic=True)))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled() and repeats(GPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("every", "device", "collected"),
    [(3, CPU, [3, 6]), (0, CPU, []), (None, CPU, []), (0, GPU, []), (2, GPU, [2, 4, 6])],
)
def test_garbage_is_collected_at_its_steps(every: int | None, device: torch.device, collected: list[int]):
    seen: list[int] = []
    step = 0

    def note(phase: str, found: dict[str, int]) -> None:
        if phase == "start" and step:
            seen.append(step)

    collection = GarbageCollection(every, device)
    gc.callbacks.append(note)
    try:
        with collection.by_hand():
            assert gc.isenabled() == (not collected)
            gc.disable()  # what Python does by itself is not counted here
            for step in range(1, 7):
                collection.step(step)
            step = 0
            gc.enable()
    finally:
        gc.callbacks.remove(note)
    assert seen == collected
    assert gc.isenabled()


def test_on_gpus_garbage_is_collected_every_fifty_steps_unless_told_otherwise():
    with GarbageCollection(None, GPU).by_hand():
        assert not gc.isenabled()
    with GarbageCollection(None, CPU).by_hand():
        assert gc.isenabled()


@pytest.mark.parametrize(
    ("asked", "kind", "device", "answer"),
    [
        ("auto", "single", GPU, True),
        ("auto", "zero2", GPU, True),
        ("auto", "zero3", GPU, False),
        ("auto", "single", CPU, False),
        (False, "single", GPU, False),
        (True, "single", CPU, True),
    ],
)
def test_what_auto_comes_to(asked: Any, kind: str, device: torch.device, answer: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = settled(Config(train=TrainConfig(compile=asked)), kind, device)
    assert config.train.compile is answer
    assert settled(config, kind, device) == config


def test_why_a_gpu_does_not_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert obstacle(GPU) == "Triton is not installed"
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert "needs a C compiler" in obstacle(GPU)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    assert obstacle(GPU) == "Triton makes no kernels for Tesla P40"


@pytest.mark.parametrize(("device", "needed"), [(CPU, "CPUs need the C++ compiler"), (GPU, "Triton needs a C")])
def test_compiling_without_a_compiler_is_refused_before_anything_is_made(
    device: torch.device, needed: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=f"train.compile=true: {re.escape(needed)}.*use train.compile=false"):
        check_compile(True, device)
    for asked in ("auto", False):
        check_compile(asked, device)


HEAP = """
import resource, sys, torch
from stablelm.config.load import load
from stablelm.engine.process.torch_settings import arrange_heap

arrange_heap(load([], sys.argv[1:]).config, torch.device("cpu"))

def step():
    sizes = [2**17, 2**20, 3 * 2**20, 10**7]
    kept = [torch.ones(size) for size in sizes]
    return sum(float(each[0]) for each in kept)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is asked")
@pytest.mark.parametrize(("asked", "least", "most"), [([], 0, 15), (["engine.memory_limit=1e10"], 20, 10**6)])
def test_freed_tensors_are_kept_for_the_next_step_unless_memory_is_limited(asked: list[str], least: int, most: int):
    # 57 MB of tensors are 13,800 pages of 4 kB, or 28 huge ones.
    done = subprocess.run([sys.executable, "-c", HEAP, *asked], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
