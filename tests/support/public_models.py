"""Model folders in public formats: made by transformers itself with random weights, or written by hand in a moment."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stablelm.tokenizers import load_tokenizer

POSITIONS = 64
KINDS = ("llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gpt2")


def make(kind: str, tokenizer: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers in evaluation mode, six layers; every norm and bias differs from its start."""
    import transformers

    tokens = load_tokenizer(tokenizer)
    shared = {"vocab_size": tokens.pieces + 3, "eos_token_id": tokens.eos, "initializer_range": 0.08}
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "num_attention_heads": 4}
    llama = {**shared, **sizes, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {**llama, "rope_theta": 5e5, "rms_norm_eps": 1e-5}),
        "llama_tied": ("Llama", {**llama, "tie_word_embeddings": True}),
        "llama_biased": ("Llama", {**llama, "attention_bias": True}),
        "mistral": ("Mistral", {**llama, "sliding_window": None}),
        "qwen2": ("Qwen2", llama),
        "qwen3": ("Qwen3", {**llama, "head_dim": 12}),
        "gpt2": ("GPT2", {**shared, "n_embd": 48, "n_layer": 6, "n_head": 4, "n_positions": POSITIONS}),
    }
    name, keys = own[kind]
    config = getattr(transformers, f"{name}Config")(**{**keys, "bos_token_id": None, **changes})
    torch.manual_seed(seed)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(model: Any, folder: Path, tokenizer: str, **options: Any) -> Path:
    """A folder as the hub has it, with a SentencePiece tokenizer."""
    model.save_pretrained(folder, **options)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(batch, seq, vocab_size) of a model of transformers."""
    with torch.no_grad():
        return model(ids).logits


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
}


def llama_tensors(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tensors of LLAMA by its own names."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (vocabulary, 16), "model.norm.weight": (16,)}
    shapes["lm_head.weight"] = (vocabulary, 16)
    for layer in range(3):
        for name, shape in (
            ("self_attn.q_proj", (16, 16)),
            ("self_attn.k_proj", (8, 16)),
            ("self_attn.v_proj", (8, 16)),
            ("self_attn.o_proj", (16, 16)),
            ("mlp.gate_proj", (32, 16)),
            ("mlp.up_proj", (32, 16)),
            ("mlp.down_proj", (16, 32)),
            ("input_layernorm", (16,)),
            ("post_attention_layernorm", (16,)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: torch.randn(shape) / 4 for name, shape in shapes.items()}


def write_llama(
    folder: Path,
    tokenizer: str,
    changes: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A small LLaMA; `changes`: keys of config.json, `tensors`: other ones by name."""
    tokens = load_tokenizer(tokenizer)
    folder.mkdir(parents=True)
    config = {**LLAMA, "vocab_size": tokens.pieces, "eos_token_id": tokens.eos, **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**llama_tensors(tokens.pieces), **(tensors or {})}, folder / "model.safetensors")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder
