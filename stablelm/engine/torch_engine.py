"""The engine on torch alone: one process, DDP or FSDP2, chosen by `kind`."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stablelm.checkpoint.portable import clean_name
from stablelm.config.schema import Config, ModelConfig
from stablelm.engine.mesh import Ranks
from stablelm.engine.recompute import recompute_layers
from stablelm.engine.sigma import SigmaMatrices, sum_over_ranks
from stablelm.methods import spectral
from stablelm.methods.initialise import initial_values, roles
from stablelm.methods.stream import Concat
from stablelm.model.decoder import Decoder
from stablelm.model.loss import LossSums
from stablelm.model.sublayer import Layer, Sublayer
from stablelm.train.optimizer import adamw, set_learning_rate


class TorchEngine:
    """Meets `engine.base.Engine`. `config` is resolved; `train=False` builds no optimizer."""

    def __init__(self, config: Config, kind: str, ranks: Ranks, *, train: bool = True):
        self.kind, self.device = kind, ranks.device
        self._world_size, self._z_loss, self._grad_clip = ranks.world_size, config.train.z_loss, config.train.grad_clip
        with torch.device("meta"):
            self.module = Decoder(config.model, str(config.train.precision))
        self._roles = roles(self.module)
        if config.engine.recompute == "full":
            recompute_layers(self.module.layers)
        if config.train.compile:
            compile_layers(self.module.layers, config.model)
        if kind == "fsdp2":
            shard(self.module, self.module.layers, ranks)
        self._materialise(config, ranks)
        self.sigma = SigmaMatrices(self.module)
        self._call: nn.Module = self.module
        if kind == "ddp":
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            # Weights are equal by construction (seeded by name), so nothing needs a broadcast at the start.
            self._call = DistributedDataParallel(self.module, device_ids=ids, init_sync=False, broadcast_buffers=False)
        self.module.train(train)
        self.optimizer = adamw(self.parameters(), self._roles, config.train, config.model) if train else None

    def _materialise(self, config: Config, ranks: Ranks) -> None:
        """Gives every parameter and buffer its seeded initial value, or this rank's part of it."""
        self.module.to_empty(device=self.device)
        named = self.parameters()
        tensors = named | self.buffers()
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        starts = spectral.SharedStarts(ranks.rank, ranks.world_size)
        shared: dict[str, Tensor] = {}
        for name, whole in initial_values(shapes, config.model, config.run.seed, starts):
            if whole.dtype == torch.float64:
                shared[name] = whole  # of the spectral start: this rank's share of it
            else:
                _fill(tensors[name], whole)
        for name, whole in sum_over_ranks(shared, ranks).items():
            _fill(tensors[name], whole)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters (shards under fsdp2) by portable name; a tied head appears once."""
        return {clean_name(name): parameter for name, parameter in self.module.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """What is state but not learned (the vectors of spectral norms), whole on every rank, by portable name."""
        return {clean_name(name): buffer for name, buffer in self.module.named_buffers()}

    def loss(self, tokens: Tensor, targets: Tensor) -> LossSums:
        return self._call(tokens, targets, z_loss=self._z_loss)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        with self._call.no_sync() if isinstance(self._call, DistributedDataParallel) and not last else nullcontext():
            # Both wrappers average over ranks; the loss is already divided by the tokens of all ranks.
            (loss * self._world_size).backward()

    def step(self, lr: float) -> Tensor:
        assert self.optimizer is not None, "an engine built with train=False cannot step"
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self._grad_clip, norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.sigma.refresh()
        self.clear_gradients()
        return norm.detach()

    def clear_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def tensors(self, *, optimizer: bool = True) -> dict[str, Tensor]:
        named = self.parameters()
        weights = named | self.buffers()
        found: dict[str, Tensor] = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
        if optimizer and self.optimizer is not None:
            for name, parameter in named.items():
                for moment, value in self.optimizer.state[parameter].items():
                    found[f"optim.{name}.{moment}"] = value
        return found


@torch.no_grad()
def _fill(tensor: Tensor, whole: Tensor) -> None:
    """Copies a value that every rank has whole into a tensor or this rank's part of it: no traffic, any world size."""
    value = whole.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def compile_layers(layers: nn.ModuleList, config: ModelConfig) -> None:
    """Compiles each layer in place; all share one graph, so a second one means a shape that should not vary.

    On a concatenated stream, whose width grows, the bodies after the first maps: their shapes are fixed.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if config.placement == "pre_scaled" or config.stream == "dense" or config.attention.shaping == "espa":
        torch._dynamo.config.recompile_limit = max(8, 2 * config.n_layers)  # a graph for each layer
    for layer in layers.modules():
        if isinstance(layer, Layer) and not isinstance(layer.stream, Concat):
            layer.compile()
        elif isinstance(layer, Sublayer) and isinstance(layer.stream, Concat):
            layer.body.compile()


def shard(module: nn.Module, layers: nn.ModuleList, ranks: Ranks) -> None:
    """FSDP2: one unit a layer, the embedding, head and final norm in the root unit."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
