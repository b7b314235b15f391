"""Parts of a run from its prepared configuration, and the save that ties them together."""

from dataclasses import replace

from torch import Tensor

from stablelm.checkpoint import keep
from stablelm.checkpoint.background import Saver
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.config.load import dump
from stablelm.data import validation
from stablelm.data.loader import Loader
from stablelm.data.storage.options import SeenFiles
from stablelm.engine.base import Engine
from stablelm.engine.mesh import Ranks
from stablelm.observe.layers import rows_for
from stablelm.train.faults import Faults
from stablelm.train.guards import Guard
from stablelm.train.prepare import Prepared, validation_options
from stablelm.train.progress import Progress


def build_loader(prepared: Prepared, ranks: Ranks) -> Loader:
    """The stream of this rank's batches."""
    assert prepared.corpora is not None
    return Loader(
        prepared.corpora.train,
        prepared.tokenizer,
        prepared.config.data,
        seed=prepared.config.run.seed,
        global_batch_size=prepared.config.train.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seen=SeenFiles.of(prepared.config.run.dir),
    )


def first_rows(prepared: Prepared, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The first windows of the training text, (rows, seq_len) tokens and targets, whatever the batch and the ranks."""
    config = prepared.config
    assert prepared.corpora is not None
    data = replace(config.data, seq_len=seq_len, workers=0)
    files = prepared.corpora.train
    loader = Loader(files, prepared.tokenizer, data, seed=config.run.seed, global_batch_size=rows)
    batch = loader.next()
    loader.close()
    return batch.tokens, batch.targets


def layers_batch(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The fixed batch on which layers are measured: the run's first rows."""
    seq_len = prepared.config.data.seq_len
    return first_rows(prepared, rows_for(seq_len), seq_len)


def read_validation(prepared: Prepared) -> dict[str, validation.ValidationSet]:
    """Every validation set, the same on all ranks."""
    config = prepared.config
    assert prepared.corpora is not None
    seen = SeenFiles.of(config.run.dir)
    return {
        name: validation.read(
            files,
            prepared.tokenizer,
            seq_len=config.data.seq_len,
            sequences=config.evaluate.batches * config.train.global_batch_size,
            options=replace(validation_options(config, name), seen=seen),
        )
        for name, files in prepared.corpora.validation.items()
    }


def build_saver(prepared: Prepared, fence: Fence, ranks: Ranks, progress: Progress, faults: Faults) -> Saver:
    """Saves this attempt's steps and keeps as many as configured."""
    checkpoint = prepared.config.checkpoint

    def committed(step: int) -> None:
        progress.checkpointed_step = step
        faults.saved(step)

    return Saver(
        fence,
        ranks.save_group,
        shapes=expected_shapes(prepared.config.model),
        background=checkpoint.async_,
        committed=committed,
        retain=lambda: keep.retain(fence.root, checkpoint.keep, checkpoint.keep_permanent_every),
    )


def save(
    prepared: Prepared,
    engine: Engine,
    loader: Loader,
    ranks: Ranks,
    progress: Progress,
    guard: Guard,
    saver: Saver,
    *,
    wait: bool,
) -> None:
    """Saves the current step unless that is done; returns before the commit only without `wait`."""
    saver.wait()
    if progress.checkpointed_step == progress.step:
        return
    assert prepared.corpora is not None
    lanes: dict[str, list[int]] = {}
    for part in ranks.gather(loader.state()):
        lanes |= part["lanes"]
    state = {
        "step": progress.step,
        "tokens": progress.tokens,
        "skipped_rows": progress.skipped_rows,
        "data": {"data_step": loader.state()["data_step"], "lanes": lanes},
        "identity": prepared.corpora.identity,
        "guards": guard.state(),
        "evaluation_due": progress.evaluation_due,
    }
    saver.save(progress.step, engine.tensors(), state, dump(prepared.asked), wait=wait)
