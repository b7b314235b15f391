"""Model folders of the format `hf`, written from a decoder by way of a checkpoint's tensors."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stablelm.checkpoint.format import save_tensors
from stablelm.config.schema import ModelConfig
from stablelm.export.hf_model import writer
from stablelm.export.weights import Weights
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.linear import derive
from stablelm.private_names import saved_buffers


def write_folder(decoder: Decoder, folder: Path, *, dtype: torch.dtype = torch.float32, **extra: Any) -> Path:
    """The decoder as a folder that transformers loads."""
    checkpoint = folder.with_name(f"{folder.name}-checkpoint")
    checkpoint.mkdir(parents=True)
    state = dict(decoder.named_parameters()) | saved_buffers(decoder)
    save_tensors(checkpoint / "tensors", {f"model.{name}": each.detach() for name, each in state.items()}, None)
    source: Any = SimpleNamespace(model=decoder.config, weights=Weights(checkpoint))
    assert writer.obstacles(source) == []
    folder.mkdir()
    shutil.copy(writer.MODELLING_FILE, folder)
    config = writer.config(source) | {"dtype": str(dtype).removeprefix("torch.")} | extra
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: lazy.to(dtype) for name, lazy in writer.tensors(source)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def moved_decoder(config: ModelConfig, precision: str = "fp32") -> Decoder:
    """An initialised decoder whose every gain, bias, slope and mixing weight is moved off its start, in evaluation
    mode; matrices that start small are larger, and an untied head gives logits of variance 1."""
    decoder = Decoder(config, precision)
    initialise(decoder, config, 3)
    generator = torch.Generator().manual_seed(4)
    names = {name for name, _ in decoder.named_parameters()}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("query.weight") and not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif parameter.std() < 0.03 and name.replace(".weight", ".matrix_gain") not in names:
                parameter.mul_(5)
        derive(decoder)
        if decoder.head is not None:
            decoder.head.weight.div_(our_logits(decoder, torch.arange(16)[None]).std())
    return decoder.eval()


@torch.no_grad()
def our_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """(batch, seq, vocab_size)."""
    return decoder(tokens) @ decoder.head_weight().T


def load(folder: Path, **options: Any) -> Any:
    """By transformers' own way."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
