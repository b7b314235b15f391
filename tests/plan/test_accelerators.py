"""The table of accelerators, and those that flags describe."""

import json
from pathlib import Path

import pytest
from planned import SHAPE

from stablelm.errors import ConfigError
from stablelm.observe.accelerators import ACCELERATORS, FLAGS, chosen, named_by
from stablelm.plan.planner import plan

SMALL = [*SHAPE, "model.vocab_size=320", "train.global_batch_size=32", "train.precision=bf16", "engine.kind=zero3"]


def described(name: str) -> dict[str, float | None]:
    """The entry of the table as flags."""
    known = ACCELERATORS[name]
    return {flag: getattr(known, field) / unit for flag, (field, unit, *_) in FLAGS.items()}


def test_the_table_is_of_plausible_devices():
    for name, known in ACCELERATORS.items():
        assert known.name == name
        assert 1e14 < known.peak < 1e16
        assert 24e9 <= known.memory < 1e12
        # FLOPs a byte of memory traffic, and of TDP: within what these generations reach.
        assert 100 < known.peak / known.memory_bandwidth < 500
        assert known.power is not None and 3e11 < known.peak / known.power < 3e12
        assert known.network <= known.link <= known.memory_bandwidth
        chosen(None, described(name))  # every figure is in the range of its flag


@pytest.mark.parametrize("name", ACCELERATORS)
def test_described_as_in_the_table_it_gives_the_same_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    offload = "engine.offload=optimizer"  # so that the host's link counts too
    found = []
    for gpu, figures in ((name, {}), ("mine", described(name))):
        out = tmp_path / f"{gpu}.json"
        assert (
            plan([], [*SMALL, offload], world_sizes=(16,), gpu=gpu, figures=figures, out=str(out), simulated=False) == 0
        )
        made = json.loads(out.read_text())
        del made["seconds"], made["accelerator"]
        found.append((made, capsys.readouterr().out.replace(gpu, "GPU")))
    assert found[0] == found[1]


def test_figures_of_the_system_replace_those_of_the_table():
    slow = chosen("h100-80", {"--network-bandwidth": 12.5, "--watts": 500})
    assert (slow.network, slow.power, slow.peak) == (12.5e9, 500, ACCELERATORS["h100-80"].peak)
    assert chosen(None, {}) == ACCELERATORS["h100-80"]
    assert chosen("A100-80", {}) == ACCELERATORS["a100-80"]


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [
        (
            "h1000",
            {},
            r"--gpu h1000 is not in the table, did you mean h100-80\? .*describe any other by --peak-tflops, ",
        ),
        ("abacus", {}, r"--gpu abacus is not in the table \(one of a100-40, .*--memory-gb and --bandwidth$"),
        (None, {"--peak-tflops": 312}, "described by --peak-tflops also needs --memory-gb and --bandwidth"),
        ("x", {"--memory-gb": 80, "--bandwidth": 2000}, "by --memory-gb and --bandwidth also needs --peak-tflops"),
        (
            "h100-80",
            {"--peak-tflops": 800, "--memory-gb": 80, "--bandwidth": 2000},
            "--gpu h100-80 is in the table, so --peak-tflops and --memory-gb and --bandwidth cannot describe it",
        ),
        (None, {"--bandwidth": 3.35}, "--bandwidth 3.35 must be between 10 and 1,000,000 GB/s"),
        (None, {"--memory-gb": -80}, "--memory-gb -80 must be between 1 and 10,000 GB"),
        (None, {"--watts": float("nan")}, "--watts nan must be between 1 and 100,000 W"),
    ],
)
def test_descriptions_that_cannot_be(name: str | None, figures: dict[str, float | None], words: str):
    with pytest.raises(ConfigError, match=words):
        chosen(name, figures)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_drivers_names(driver: str, name: str | None):
    """A board of the same chip with other rates is not taken for the one in the table."""
    assert named_by(driver) == (ACCELERATORS[name] if name else None)
