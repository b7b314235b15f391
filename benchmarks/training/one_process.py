"""One contestant in a process of its own: builds, warms up, then times a few steps for each line of its input.

    python -m benchmarks.training.one_process NAME SETTINGS_AS_JSON

Settings: shape, vocab_size, precision, compiled, cold (no compiled code is kept), matmuls (their rate is measured too),
device, warm_up, steps, started (time.monotonic when the process was started). Prints a line of JSON once it is warm,
what that took, and one for each line that it reads, the round; between them it waits and computes nothing. Exit code 3:
the library cannot be imported; the line says why.
"""

import json
import statistics
import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

UNAVAILABLE = 3
MODULES = {
    "stablelm": ("stablelm.engine.torch_engine", "stablelm.train.step", "stablelm.config.load"),
    "litgpt": ("litgpt",),
    "transformers": ("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    "x": ("x_transformers",),
    "torchtitan": ("torchtitan.models.llama3.model.model",),
    "plain": ("benchmarks.training.plain_decoder",),
}
"""What a contestant imports, by the first word of its name: memory and time of that are reported apart."""
MATMUL = 4096
MATMULS = 6


def main(name: str, settings: dict[str, Any]) -> int:
    import torch

    from benchmarks.training.contestants import Setting, contestant
    from benchmarks.training.shape import Shape

    device = torch.device(settings["device"])
    shape = Shape.parse(settings["shape"])
    setting = Setting(shape, settings["vocab_size"], settings["precision"], settings["compiled"], device)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(setting.vocab_size, (shape.batch, shape.seq_len + 1), generator=draw).to(device)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    torch.manual_seed(0)
    try:
        for module in MODULES[name.replace(":", "-").partition("-")[0]]:
            import_module(module)
    except ImportError as error:
        print(json.dumps({"unavailable": str(error)}))
        return UNAVAILABLE
    imported, held = time.monotonic(), peak_memory(torch.device("cpu"))
    trainer = contestant(name)(setting)
    steps = Steps(trainer, tokens, targets)
    first = steps.timed(1)[0]
    steps.timed(settings["warm_up"])
    attention = 6 * shape.n_layers * shape.seq_len * shape.d_model  # causal, as `stablelm.methods.sizes` counts it
    start = {
        **({"first_step_seconds": first - settings["started"]} if settings["cold"] else {}),
        "import_memory_bytes": held if device.type == "cpu" else 0,
        "import_seconds": imported - settings["started"],
        "parameters": trainer.parameters,
        "torch": torch.__version__,
    }
    print(json.dumps(start), flush=True)
    for _ in sys.stdin:
        began = time.monotonic()
        rate = shape.tokens / statistics.median(b - a for a, b in pairwise([began, *steps.timed(settings["steps"])]))
        found = {
            "tokens_per_second": rate,
            "flops_per_second": rate * (6 * trainer.matmul_parameters + attention),
            "peak_memory_bytes": peak_memory(device),
            "losses": steps.losses(),
            **({"matmul_flops_per_second": matmul_rate(device)} if settings["matmuls"] else {}),
        }
        print(json.dumps(found), flush=True)
    return 0


class Steps:
    """Steps on one batch, one after another."""

    def __init__(self, trainer: Any, tokens: Any, targets: Any):
        self._trainer, self._tokens, self._targets = trainer, tokens, targets
        self._losses: list[Any] = []

    def timed(self, count: int) -> list[float]:
        """When each of `count` steps ended."""
        ends = []
        for _ in range(count):
            self._losses.append(self._trainer.step(self._tokens, self._targets))
            _wait(self._tokens.device)
            ends.append(time.monotonic())
        return ends

    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]


def peak_memory(device: Any) -> int:
    """The most that this process has held so far: resident bytes, on a GPU bytes of tensors."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum includes what the process that started this one held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def matmul_rate(device: Any) -> float:
    """FLOP/s of the quickest of several bf16 products of 4096 x 4096 matrices."""
    import torch

    a, b = torch.randn(2, MATMUL, MATMUL, device=device).bfloat16()
    best = float("inf")
    for _ in range(MATMULS):
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * MATMUL**3 / best


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
