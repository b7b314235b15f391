"""Ways to train a decoder of one shape: stablelm, published models, and a plain module.

Each builder imports its library and returns a contestant, whose `step` is one optimizer step. All but stablelm train
under autocast with fp32 weights, torch's fused AdamW and its clipping of gradients, and are compiled as their own
training programs compile them: as a whole, torchtitan's layer by layer. None ties its head, all have heads of 64
features and no dropout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.shape import Shape

LR = 1e-4
GRAD_CLIP = 1.0


class Setting(NamedTuple):
    """What is trained: `precision` fp32 or bf16, `compiled` with torch.compile."""

    shape: Shape
    vocab_size: int
    precision: str
    compiled: bool
    device: torch.device


class Trainer(NamedTuple):
    """`step` takes tokens and targets (batch, seq) and returns the mean loss, before the update, 0-dim."""

    step: Callable[[Tensor, Tensor], Tensor]
    parameters: int
    matmul_parameters: int
    """Of matrices that each token is multiplied with: the head too, embeddings not."""


def stablelm(setting: Setting, **keys: str) -> Trainer:
    """The engine and the step that a run has; `keys`: configuration beside the shape's."""
    from stablelm.config.load import load
    from stablelm.config.rules import resolve
    from stablelm.engine.process.torch_settings import arrange_heap
    from stablelm.engine.ranks import Ranks
    from stablelm.engine.torch_engine import TorchEngine
    from stablelm.methods.sizes import parameter_counts
    from stablelm.train.step import train_step

    shape = setting.shape
    settings = {
        "model.n_layers": shape.n_layers,
        "model.d_model": shape.d_model,
        "model.n_heads": shape.n_heads,
        "model.tie_embeddings": "false",
        "data.seq_len": shape.seq_len,
        "train.steps": 1000,
        "train.global_batch_size": shape.batch,
        "train.grad_clip": GRAD_CLIP,
        "train.precision": setting.precision,
        "train.compile": str(setting.compiled).lower(),
        **({} if keys["model.method"] == "gpt2" else {"model.activation": "swiglu", "model.d_ff": shape.gated_width}),
        **keys,
    }
    loaded = load([], [f"{key}={value}" for key, value in settings.items()])
    config = resolve(loaded.config, pieces=setting.vocab_size, world_size=1, accelerate_precision=None)
    arrange_heap(config, setting.device)
    ranks = Ranks(0, 1, setting.device, None, None)
    engine = TorchEngine(config, "single", ranks)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        found = train_step(engine, ranks, tokens, targets, step=1, lr=LR, seed=0, micro=shape.batch)
        return found.cross_entropy / found.valid

    counts = parameter_counts(config.model)
    return Trainer(step, sum(p.numel() for p in engine.parameters().values()), counts["matmul"])


def litgpt(setting: Setting) -> Trainer:
    """A LLaMA of litgpt."""
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

    shape = setting.shape
    config = Config(
        block_size=shape.seq_len, n_layer=shape.n_layers, n_embd=shape.d_model, n_head=shape.n_heads,
        vocab_size=setting.vocab_size, padded_vocab_size=setting.vocab_size, intermediate_size=shape.gated_width,
        mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, parallel_residual=False,
        rotary_percentage=1.0,
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    return _trainer(model, setting)


def transformers_gpt2(setting: Setting) -> Trainer:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = setting.shape
    config = GPT2Config(
        vocab_size=setting.vocab_size, n_positions=shape.seq_len, n_embd=shape.d_model, n_layer=shape.n_layers,
        n_head=shape.n_heads, tie_word_embeddings=False, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _trainer(GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"), setting)


def transformers_llama(setting: Setting) -> Trainer:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = setting.shape
    config = LlamaConfig(
        vocab_size=setting.vocab_size, max_position_embeddings=shape.seq_len, hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, intermediate_size=shape.gated_width,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return _trainer(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), setting)


def x_transformers(setting: Setting) -> Trainer:
    """Rotary positions, RMSNorm, no biases, GELU: two matrices of four times the width."""
    from x_transformers import Decoder, TransformerWrapper  # pyright: ignore[reportMissingImports]

    shape = setting.shape
    layers = Decoder(
        dim=shape.d_model, depth=shape.n_layers, heads=shape.n_heads, attn_dim_head=64, attn_flash=True,
        rotary_pos_emb=True, use_rmsnorm=True, ff_no_bias=True,
    )  # fmt: skip
    return _trainer(
        TransformerWrapper(
            num_tokens=setting.vocab_size, max_seq_len=shape.seq_len, attn_layers=layers, use_abs_pos_emb=False
        ),
        setting,
    )


def torchtitan(setting: Setting) -> Trainer:
    """Llama 3 of torchtitan on one device, outside of its trainer."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs  # pyright: ignore[reportMissingImports]
    from torchtitan.models.llama3.model.model import Transformer  # pyright: ignore[reportMissingImports]

    shape = setting.shape
    model = Transformer(
        TransformerModelArgs(
            dim=shape.d_model, n_layers=shape.n_layers, n_heads=shape.n_heads, vocab_size=setting.vocab_size,
            multiple_of=16, max_seq_len=shape.seq_len,
        )
    )  # fmt: skip
    model.init_weights()
    if setting.compiled:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    return _trainer(model, setting._replace(compiled=False))


def plain(setting: Setting) -> Trainer:
    from benchmarks.training.plain_decoder import PlainDecoder

    shape = setting.shape
    return _trainer(
        PlainDecoder(shape.n_layers, shape.d_model, shape.n_heads, shape.seq_len, setting.vocab_size), setting
    )


def _trainer(model: nn.Module, setting: Setting) -> Trainer:
    """A module from tokens to logits in a step like that of most training programs."""
    model.to(setting.device).train()
    parameters = list(model.parameters())
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matmul = sum(p.numel() for p in parameters if p.dim() == 2 and id(p) not in embeddings)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        found: Any = model(tokens)
        logits: Tensor = getattr(found, "logits", found)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss_of = torch.compile(loss_of) if setting.compiled else loss_of
    half = setting.precision == "bf16"

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=half):
            loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Trainer(step, sum(p.numel() for p in parameters), matmul)


CONTESTANTS: dict[str, Callable[[Setting], Trainer]] = {
    "stablelm-gpt2": lambda setting: stablelm(setting, **{"model.method": "gpt2"}),
    "stablelm-pre_ln": lambda setting: stablelm(setting, **{"model.method": "pre_ln"}),
    "stablelm-pre_ln-bf16-stream": lambda setting: stablelm(
        setting, **{"model.method": "pre_ln", "model.stream_dtype": "bf16"}
    ),
    "stablelm-pre_ln-lean": lambda setting: stablelm(
        setting, **{"model.method": "pre_ln", "engine.recompute": "full", "train.moments": "bf16"}
    ),
    "litgpt-llama": litgpt,
    "transformers-gpt2": transformers_gpt2,
    "transformers-llama": transformers_llama,
    "x-transformers": x_transformers,
    "torchtitan-llama": torchtitan,
    "plain-decoder": plain,
}
METHOD = "stablelm:"
"""Before the name of a method: that method with the activation, norms and biases of its own (`method_costs.py`)."""
OURS, PLAIN, LEAN = "stablelm", "plain-", "-lean-"


def contestant(name: str) -> Callable[[Setting], Trainer]:
    """One of CONTESTANTS, or METHOD and a method's name."""
    if name.startswith(METHOD):
        keys = {"model.method": name.removeprefix(METHOD), "model.activation": "null", "model.d_ff": "null"}
        return lambda setting: stablelm(setting, **keys)
    return CONTESTANTS[name]


def is_peer(name: str) -> bool:
    """Whether it is somebody's published model."""
    return not name.startswith((OURS, PLAIN))
