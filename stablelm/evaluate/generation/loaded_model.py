"""A trained model in one process, ready to write: the functions `stablelm.load_model` and `stablelm.generate`."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stablelm.config.schema import Config
from stablelm.engine.ranks import check_precision
from stablelm.errors import ConfigError
from stablelm.evaluate.generation.generate import Continuation, Language, Watcher, continue_prompts
from stablelm.evaluate.generation.prompts import beyond_training, encode_prompts
from stablelm.evaluate.generation.sampling import Sampling, check_counts
from stablelm.evaluate.trained_run import TrainedRun, load_module, open_run
from stablelm.model.decoder import Decoder
from stablelm.model.sublayer import Sublayer
from stablelm.paths import expand

PRECISIONS = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class LoadedModel:
    """`module(tokens)` gives hidden states (batch, seq, d_model), `module.logits` the logits of these.

    It is fixed, which makes it faster: spectral norms are multiplied into weights, and matrices have the dtype in which
    they multiply. It cannot be trained further; for that, a run is resumed or begun by `run.init_from`.
    """

    run: TrainedRun
    module: Decoder
    device: torch.device

    @property
    def config(self) -> Config:
        """The run's resolved configuration."""
        return self.run.config

    @property
    def language(self) -> Language:
        """What generation asks for."""
        module = self.module
        return Language(
            lambda tokens, columns, cache: module(tokens, cache=cache, logits_at=columns),
            self.config.model,
            self.run.tokenizer,
            self.device,
        )


def load_model(
    checkpoint: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    trust_checkpoint: bool = False,
    device: str | None = None,
    precision: str | None = None,
    average: str | None = None,
) -> LoadedModel:
    """The model of a run (its newest valid checkpoint) or of a step directory, local or by URL, on one device.

    `tokenizer`: its path, None for the one that the run keeps. `trust_checkpoint`: a method that the checkpoint names
    by import path is imported. `device`: as torch names it; None: a GPU if there is one. `precision`: fp32, bf16 or
    fp64; None: the run's, but fp32 on a GPU without bfloat16. `average`: which weights, in place of
    the run's `evaluate.average`. Raises CheckpointError and ConfigError.
    """
    place = expand(os.fspath(checkpoint), "checkpoint=")
    run = open_run(place, tokenizer=tokenizer, trusted=trust_checkpoint, average=average)
    return load(run, device, precision)


def load(run: TrainedRun, device: str | None = None, precision: str | None = None) -> LoadedModel:
    """As `load_model`, of a run that is open."""
    place, trained = _device(device), str(run.config.train.precision)
    if precision is None:
        precision = trained
        try:
            check_precision(precision, place)
        except ConfigError:
            precision = "fp32"
    elif precision not in PRECISIONS:
        raise ConfigError(f"precision={precision} must be one of {', '.join(PRECISIONS)}")
    check_precision(precision, place)
    asked = replace(run, config=replace(run.config, train=replace(run.config.train, precision=precision)))
    if "fp64" in (precision, trained) and precision != trained:
        module = _converted(load_module(run, "cpu"), asked.config, place)
    else:
        module = load_module(asked, place)
    return LoadedModel(asked, fixed(module), place)


def generate(
    model: LoadedModel,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    samples: int = 1,
    batch_size: int = 8,
    grown: Callable[[int, str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt; `samples` of each, one after the other.

    `temperature`, `top_k`, `top_p`, `repetition_penalty`, `stop`: see `Sampling`; temperature 0 is greedy. A row ends
    with the end token, before a stop string or after `max_new_tokens`. `grown` is called with the index of a text and
    what it grew by. A text depends on its prompt and `seed`, not on the other prompts. Raises ConfigError.
    """
    ends = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, ends, seed)
    texts = [prompts] if isinstance(prompts, str) else prompts
    watcher = Watcher(grown=grown) if grown is not None else None
    return [
        each.text for each in write(model, texts, sampling, samples=samples, batch_size=batch_size, watcher=watcher)
    ]


def write(
    model: LoadedModel,
    texts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 8,
    watcher: Watcher | None = None,
) -> list[Continuation]:
    """`samples` continuations of each text. Warns where positions go beyond those of training. Raises ConfigError."""
    check_counts(samples=samples, batch_size=batch_size)
    sampling.check_samples(samples)
    language, new = model.language, sampling.max_new_tokens
    prompts = encode_prompts(texts, language.tokenizer, language.config, new_tokens=new, samples=samples)
    if notice := beyond_training(prompts, language.config, new):
        warnings.warn(notice, stacklevel=3)
    return continue_prompts(language, prompts, sampling, batch_size=batch_size, watcher=watcher)


def fixed(module: Decoder) -> Decoder:
    """The module, its maps as they act."""
    for part in module.modules():
        if isinstance(part, Sublayer):
            part.fix()
    for rest in (module.projection, module.head):
        if rest is not None:
            rest.fix()
    return module.requires_grad_(False)


def _device(asked: str | None) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=asked)
        return torch.device(asked)
    except (RuntimeError, AssertionError):  # what torch raises without CUDA
        raise ConfigError(f"device={asked} is not one of this machine; use cpu, cuda or cuda:N") from None


def _converted(module: nn.Module, config: Config, device: torch.device) -> Decoder:
    """The same weights, rounded to another precision."""
    with torch.device("meta"):
        other = Decoder(config.model, str(config.train.precision))
    other.to_empty(device=device).load_state_dict(module.state_dict())
    return other.eval()
