"""The first step is a rehearsal: what would fail after hours of queueing fails before the clock starts."""

import time

import torch

from stablelm.checkpoint.background import Saver
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.observe.interval_metrics import peak_memory
from stablelm.train.step import seed_dropout


def rehearse(config: Config, engine: Engine, ranks: Ranks, saver: Saver) -> str:
    """Runs one full micro-batch forward and backward and writes a sample of a checkpoint; changes nothing.

    Returns a line with time and memory; `saver` knows about how long a save takes. Raises StorageError if the
    checkpoint directory cannot take a checkpoint.
    """
    started = time.perf_counter()
    rows = config.train.micro_batch_size or config.train.global_batch_size // ranks.world_size
    seed_dropout(config.run.seed, 0, 0, ranks.rank)
    tokens = torch.randint(0, config.model.vocab_size or 1, (rows, config.data.seq_len + 1)).to(engine.device)
    sums = engine.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
    engine.backward(sums.total / sums.valid, last=True)
    engine.clear_gradients()
    computed = time.perf_counter() - started
    saved = saver.rehearse(engine.tensors())
    return (
        f"rehearsal: {rows} x {config.data.seq_len} tokens forward and backward {computed:.1f} s, "
        f"peak memory {peak_memory(engine.device) / 2**30:.2f} GiB, "
        f"a save of {saved.bytes / 2**20:.0f} MiB about {saver.seconds:.2f} s"
    )
