"""Small resolved configs to plan, and what a real step of them keeps."""

from collections import Counter
from dataclasses import replace

import torch
from torch.utils._pytree import tree_leaves

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.methods.concatenation import Concatenation
from stablelm.methods.sizes import stream_width
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.memory import recompute
from stablelm.model.sublayer import Sublayer

SHAPE = (
    "model.d_model=64",
    "model.n_heads=4",
    "model.n_layers=4",
    "data.seq_len=64",
    "data.lanes=5040",
    "train.steps=5",
    "train.micro_batch_size=2",
)


def planned(*overrides: str, world_size: int = 1, micro_batches: int = 1, kind: str = "single") -> Config:
    """A resolved config of `micro_batches` micro-batches of two sequences a rank."""
    batch = f"train.global_batch_size={2 * micro_batches * world_size}"
    config = load([], [*SHAPE, batch, f"engine.kind={kind}", *overrides]).config
    return resolve(config, pieces=300, world_size=world_size, accelerate_precision=None)


def kept_in_a_real_step(config: Config) -> Counter[str]:
    """Bytes of distinct storages that autograd saves, or that a recomputed layer was given, before the loss.

    `weight_copies` are matrices in another dtype than the weights; the weights themselves do not count.
    """
    decoder = Decoder(config.model, str(config.train.precision))
    initialise(decoder, config.model, 0)
    shapes = {tuple(p.shape) for p in decoder.parameters() if p.ndim == 2}
    for part in decoder.modules():
        if isinstance(part, Sublayer):  # several maps are copied into one matrix
            first = [linear.first.weight for linear in part.body.first_maps]
            rows, columns = sum(map(len, first)), first[0].shape[1]
            shapes.add((rows, columns))
            if part.stream.grows:  # columns beyond the stream are zeros
                embedded, width = torch.zeros(1, 1, columns), stream_width(config.model, config.model.n_layers)
                shapes.add((rows, Concatenation.start(embedded, width, torch.bfloat16).read_width))
    shapes |= {shape[::-1] for shape in shapes}
    own = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
    found: dict[int, tuple[str, int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            copy = tuple(tensor.shape) in shapes and tensor.dtype == torch.bfloat16
            found[storage.data_ptr()] = ("weight_copies" if copy else "activations", storage.nbytes(), tensor)
        return tensor

    if config.engine.recompute == "full":
        recompute.apply(decoder.layers, "full", dropout=0.0)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(lambda module, inputs: [keep(chunk) for chunk in inputs[0]] and None)
    tokens = torch.randint(300, (config.train.micro_batch_size or 1, config.data.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(tokens, tokens)
    for tensor in tree_leaves([vars(module) for module in decoder.modules()]):
        if isinstance(tensor, torch.Tensor):
            keep(tensor)  # a table that a module made in its first pass
    total: Counter[str] = Counter()
    for kind, size, _ in found.values():
        total[kind] += size
    return total


def with_layers(config: Config, n_layers: int) -> Config:
    return replace(config, model=replace(config.model, n_layers=n_layers))
