"""A checkpoint opened for use: which one, its configuration and tokenizer, and its model as a plain module."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stablelm.checkpoint import saved_run, selection
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.config.averages import EMA, parse
from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.data.corpus import configured_tokenizer
from stablelm.errors import CheckpointError, ConfigError
from stablelm.evaluate import consent
from stablelm.model.decoder import Decoder
from stablelm.model.linear import derive
from stablelm.optimizers.catalogue import find
from stablelm.private_names import saved_buffers
from stablelm.tokenizers import Tokenizer
from stablelm.tokenizers.location import kept_tokenizer


@dataclass(frozen=True)
class TrainedRun:
    """`config` is resolved; `tokenizer` is the one that the run was trained with, by hash."""

    checkpoint: CheckpointPath
    step: int
    config: Config
    tokenizer: Tokenizer


def open_run(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    has_data: bool = True,
    own: Loaded | None = None,
    trusted: bool = False,
    first_rank: bool = True,
    average: str | None = None,
) -> TrainedRun:
    """The run at a run directory (its newest valid checkpoint) or a step directory, local or by URL.

    `tokenizer`: its path, None for the one that the run keeps. `has_data`: the caller names the text, so that the
    run's own validation text is not opened. `own`: the user's configuration, `trusted`: the checkpoint's is used like
    it; of a checkpoint alone nothing is imported or opened beyond plain files. `average`: in place of the run's
    `evaluate.average`. Raises CheckpointError and ConfigError.
    """
    from stablelm.checkpoint import contents

    found = selection.resolve_checkpoint(
        checkpoint,
        lacks=partial(contents.problems, optimizer=False, trusted=trusted),
        elsewhere=consent.elsewhere(checkpoint, own, trusted),
    )
    state = saved_run.read_state(found)
    config = consent.configuration_for(found, has_data=has_data, own=own, trusted=trusted, first_rank=first_rank)
    if average is not None:
        config = replace(config, evaluate=replace(config.evaluate, average=average))
        check_average(found, config)
    loaded = _tokenizer(tokenizer, found, config, state["identity"].get("data.tokenizer"))
    return TrainedRun(found, state["step"], config, loaded)


def check_average(checkpoint: CheckpointPath, config: Config) -> None:
    """Raises ConfigError or CheckpointError where the checkpoint does not have what `--average` asks for."""
    from stablelm.checkpoint.weights import EvaluatedWeights

    average = parse(str(config.evaluate.average), "--average")
    if average.kind == EMA and not config.train.ema:
        raise ConfigError(f"--average ema: {checkpoint} was trained without train.ema; use none or last:K")
    if average.kind == "last" and find(config.train).evaluation_state():
        raise ConfigError(
            f"--average {config.evaluate.average}: train.optimizer={config.train.optimizer} averages already; use none"
        )
    EvaluatedWeights.of(checkpoint, config).averaged(strict=True)


def load_module(run: TrainedRun, device: torch.device | str = "cpu") -> Decoder:
    """The whole model with the checkpoint's weights, of `evaluate.average`, on one device, in evaluation mode.

    Parameters have the dtype in which they were trained: fp32, or fp64 under fp64.
    """
    from stablelm.checkpoint.weights import EvaluatedWeights

    with torch.device("meta"):
        module = Decoder(run.config.model, str(run.config.train.precision))
    module.to_empty(device=device)
    state = dict(module.named_parameters()) | saved_buffers(module)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in state.items()}
    EvaluatedWeights.of(run.checkpoint, run.config).load(tensors, {name for name, _ in module.named_parameters()})
    derive(module)
    return module.eval()


def parameter_names(run: TrainedRun) -> set[str]:
    """What the run's model learns, by name."""
    with torch.device("meta"):
        module = Decoder(run.config.model, str(run.config.train.precision))
    return {name for name, _ in module.named_parameters()}


def _tokenizer(requested: str | None, checkpoint: CheckpointPath, config: Config, sha256: str | None) -> Tokenizer:
    """The one that the run was trained with, by hash: as requested, as kept in the run directory, or as configured."""
    if sha256 is None:  # every complete identity has it
        raise CheckpointError(f"{checkpoint} does not give the hash of its tokenizer: load another checkpoint")
    path = requested or _kept(checkpoint) or config.data.tokenizer
    if not path:
        raise ConfigError(f"{checkpoint} comes without its tokenizer; name the one it was trained with by --tokenizer")
    found = configured_tokenizer(replace(config.data, tokenizer=path))
    if found.sha256 != sha256:
        raise ConfigError(
            f"tokenizer {path} is not the one that {checkpoint} was trained with; name that one by --tokenizer"
        )
    return found


def _kept(checkpoint: CheckpointPath) -> str | None:
    return kept_tokenizer(checkpoint.parent.parent) if isinstance(checkpoint, Path) else None
