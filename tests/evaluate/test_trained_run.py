"""A checkpoint opened as a plain module computes what the run's evaluation reports."""

from pathlib import Path

import pytest
import torch
from support.programs import TINY, run, summary
from support.tiny import TinyCorpus

from stablelm.data import validation
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import CheckpointError
from stablelm.evaluate.trained_run import load_module, open_run


@pytest.mark.parametrize("method", ["sigma_reparam", "catformer"])
def test_the_module_gives_the_validation_loss_of_the_run(method: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    extra = (f"run.dir={tmp_path / 'run'}", "train.steps=3", f"model.method={method}")
    done = run("pretrain", *TINY, *tiny_corpus.overrides(), *extra)
    assert done.returncode == 0, done.stderr
    opened = open_run(str(tmp_path / "run"))
    config = opened.config
    sequences = config.evaluate.batches * config.train.batch_sizes.first
    path = config.data.validation_path
    assert isinstance(path, str)
    options = ReadOptions.of(config.data)
    windows = validation.read(
        [path], opened.tokenizer, seq_len=config.data.seq_len, sequences=sequences, options=options
    )
    with torch.no_grad():
        sums = load_module(opened)(torch.as_tensor(windows.tokens), torch.as_tensor(windows.targets))
    assert float(sums.cross_entropy / sums.valid) == pytest.approx(summary(tmp_path / "run")["val_loss"]["default"])


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_run(str(tmp_path))
