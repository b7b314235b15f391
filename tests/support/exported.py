"""Checkpoints of untrained models whose every value was moved away from its start, and their exports."""

from pathlib import Path

import torch
import yaml

from stablelm.checkpoint import commit
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.config import rules
from stablelm.config.identity import identity
from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.linear import derive
from stablelm.private_names import saved_buffers
from stablelm.tokenizers import load_tokenizer


def perturbed(config: Config, *, seed: int = 0, precision: str = "fp32") -> Decoder:
    """A model at its initial values, each then moved: vectors by 0.2, matrices by a tenth of their size."""
    decoder = Decoder(config.model, precision)
    initialise(decoder, config.model, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            size = 0.1 * parameter.abs().mean() if parameter.ndim > 1 else torch.tensor(0.2)
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    derive(decoder)
    return decoder.eval()


SMALL = ("data.lanes=12", "data.seq_len=32", "train.global_batch_size=12", "train.steps=1", "train.precision=fp32")


def resolved(tokenizer: str, *overrides: str) -> Config:
    """The configuration of a small run with that tokenizer, as a run resolves it."""
    loaded = load([], [*SMALL, f"data.tokenizer={tokenizer}", *overrides])
    found = load_tokenizer(tokenizer)
    return rules.resolve(
        loaded.config,
        pieces=found.pieces,
        eos=found.eos,
        world_size=1,
        accelerate_precision=None,
        origins=loaded.origins,
    )


def save_run(folder: Path, tokenizer: str, *overrides: str, seed: int = 0) -> tuple[Path, Decoder]:
    """A run directory with one checkpoint of a perturbed model; its path, and the model."""
    config = resolved(tokenizer, f"run.dir={folder}", *overrides)
    decoder = perturbed(config, seed=seed)
    state = dict(decoder.named_parameters()) | saved_buffers(decoder)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in state.items()}
    shapes = expected_shapes(config.model, optimizer=False)
    found = load_tokenizer(tokenizer)
    described = {
        "step": 1,
        "tokens": 384,
        "data": {"data_step": 1, "lanes": {}},
        "identity": identity(config, base_names=["text.jsonl"], tokenizer_sha256=found.sha256),
    }
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    asked = yaml.safe_dump(_nested((*SMALL, *overrides)))
    commit.save(Fence(checkpoints, 1, "a1"), 1, tensors, described, asked, shapes=shapes, group=None)
    (folder / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())
    return folder, decoder


def _nested(overrides: tuple[str, ...]) -> dict:
    found: dict = {}
    for override in overrides:
        name, value = override.split("=", 1)
        *sections, last = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    return found


def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """(batch, seq, vocab_size)."""
    with torch.no_grad():
        return torch.nn.functional.linear(decoder(tokens), decoder.head_weight())
