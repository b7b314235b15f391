"""The engine on torch alone: one process, DDP, FSDP2 or HSDP, chosen by `kind`."""

import math
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stablelm.config.engine_rules import SHARDED
from stablelm.config.schema import Config, TrainConfig
from stablelm.engine.after_step import Reparametrised, initial_tensors
from stablelm.engine.optimizers import (
    average,
    clip,
    decay_now,
    make_optimizer,
    norms,
    refused,
    set_learning_rate,
    set_weight_decay,
    total_norm,
)
from stablelm.engine.process.compilation import compile_layers, limit_explained, settled, uncompiled
from stablelm.engine.ranks import Ranks
from stablelm.engine.sharding import allocate, in_shards, make_mesh, offloads, replicated, shard
from stablelm.engine.tensor_parts import clean_name
from stablelm.engine.updates.backward_updates import BackwardUpdates
from stablelm.engine.updates.ema import update_average
from stablelm.engine.updates.passes import Passes
from stablelm.engine.updates.qk_clip import QkClip
from stablelm.engine.updates.state import follow_weights
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder
from stablelm.model.devices import to_device
from stablelm.model.initialise import roles
from stablelm.model.loss import LossSums, TokenScores
from stablelm.model.memory import recompute
from stablelm.model.sublayer import Sublayer
from stablelm.model.token_loss import TokenLoss
from stablelm.optimizers import catalogue
from stablelm.optimizers.interface import CURVATURE
from stablelm.private_names import saved_buffers


class TorchEngine:
    """Implements `engine.interface.Engine`. `config` is resolved; `train=False` builds no optimizer."""

    def __init__(self, config: Config, kind: str, ranks: Ranks, *, train: bool = True):
        self.kind, self.device, config = kind, ranks.device, settled(config, kind, ranks.device)
        self._world_size, self._z_loss, self._grad_clip = ranks.world_size, config.train.z_loss, config.train.grad_clip
        self._token_loss = TokenLoss(config.train.loss) if config.train.loss and train else None
        self._compiled = bool(config.train.compile)
        self._offloaded = kind in SHARDED and offloads(config, self.device)
        with torch.device("meta"):
            self.module = Decoder(config.model, str(config.train.precision))
        self._roles = roles(self.module)
        if train and config.train.float8 != "none":
            for part in self.module.modules():
                if isinstance(part, Sublayer):
                    part.use_float8(config.train.float8, config.train.float8_min_width)
        recompute.apply(self.module.layers, config.engine.recompute, dropout=config.model.dropout)
        if config.train.compile:
            compile_layers(self.module.layers, config.model, config.engine.memory_budget)
            self.module.compiled_loss = ranks.device.type == "cuda"
        if kind in SHARDED:
            shard(self.module, config, make_mesh(kind, ranks, config.engine.replicas))
        self._config = config
        self._materialise(config, ranks)
        self._replicated = replicated(self.module) if kind in SHARDED else []
        self.matrices = Reparametrised(self.module)
        self._ddp = data_parallel(self.module, ranks.device) if kind == "ddp" else None
        self._call: nn.Module = self._ddp or self.module
        self.module.train(train)
        self.optimizer = make_optimizer(self.parameters(), self._roles, config.train, config.model) if train else None
        self._updates: BackwardUpdates | None = None
        self._passes: Passes | None = None
        self._qk_clip: QkClip | None = None
        self._pass = ""
        if self.optimizer is not None:
            self._prepare_updates(self.optimizer, config)

    def _prepare_updates(self, optimizer: torch.optim.Optimizer, config: Config) -> None:
        train = config.train
        if config.engine.optimizer_in_backward:
            self._updates = BackwardUpdates(optimizer)
        self._passes = Passes(catalogue.find(train), optimizer, self._total_norm, self.loaded)
        if catalogue.update_name(train) == "muon" and train.muon.qk_clip is not None:
            self._qk_clip = QkClip(self.module, train.muon.qk_clip, self.device)

    def _materialise(self, config: Config, ranks: Ranks) -> None:
        """Gives every parameter and buffer its seeded initial value, or this rank's part of it."""
        allocate(self.module, self.device, offloaded=self._offloaded)
        self._hold_parameters()
        tensors = self.parameters() | self.buffers()
        for name, whole in initial_tensors(self.module, config, ranks):
            _fill(tensors[name], whole)

    def _hold_parameters(self) -> None:
        """Kept once they have memory: after some passes FSDP2's modules show gathered parameters in place of shards."""
        self._parameters = {clean_name(name): parameter for name, parameter in self.module.named_parameters()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters (shards under fsdp2, whatever pass ran last) by portable name; a tied head appears once."""
        return dict(self._parameters)

    def buffers(self) -> dict[str, Tensor]:
        """What is state but not learned (the vectors of spectral norms), whole on every rank, by portable name."""
        return {clean_name(name): buffer for name, buffer in saved_buffers(self.module).items()}

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        last: bool = True,
        boundaries: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> LossSums:
        self._keep_gathered(torch.is_grad_enabled())
        # DDP arranges the reduction of gradients in the forward pass.
        with (
            limit_explained(self._compiled),
            self._ddp.no_sync() if self._ddp is not None and not last else nullcontext(),
        ):
            options = {"z_loss": 0.0 if self._pass == CURVATURE else self._z_loss, "token_loss": self._token_loss}
            return self._call(tokens, targets, **options, boundaries=boundaries, factors=factors)

    def drawn(self, tokens: Tensor, draws: Tensor, *, boundaries: Tensor | None = None) -> Tensor:
        self._keep_gathered(False)
        with torch.no_grad(), limit_explained(self._compiled):
            return self._call(tokens, draws=draws, boundaries=boundaries)

    def logits(self, tokens: Tensor, columns: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        self._keep_gathered(False)
        with uncompiled(self._compiled):
            return self.module(tokens, cache=cache, logits_at=columns)

    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> TokenScores:
        self._keep_gathered(False)
        return self._call(tokens, targets, places=places)

    def _keep_gathered(self, training: bool) -> None:
        """Under `engine.reshard_after_forward: never`, in a forward pass that a backward pass follows."""
        if isinstance(self.module, FSDPModule) and self._config.engine.reshard_after_forward == "never":
            self.module.set_reshard_after_forward(not training)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            self._arrange(self.module, last)
        if self._updates is not None:
            self._updates.check(loss)
        # Both wrappers average over ranks; the loss is already divided by the tokens of all ranks.
        with limit_explained(self._compiled):
            (loss * self._world_size).backward()
        if last and self._replicated:
            average(self._replicated, self._world_size)

    def _arrange(self, module: FSDPModule, last: bool) -> None:
        """What the coming backward pass reduces, and what stays gathered for the next micro-batch."""
        engine = self._config.engine
        module.set_requires_gradient_sync(last or self._in_shards)
        if self._in_shards and engine.reduce_dtype == "fp32":  # the copies of hsdp sum once a step
            module.set_requires_all_reduce(last)
        if engine.reshard_after_forward == "always":
            return
        module.set_reshard_after_backward(last, recurse=engine.reshard_after_forward == "never")
        if isinstance(self.module.head, FSDPModule):
            self.module.head.set_reshard_after_backward(last)

    @cached_property
    def _in_shards(self) -> bool:
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.module.parameters())
        cuda = self.device.type == "cuda"
        return in_shards(
            self._config, size, torch.cuda.get_device_properties(self.device).total_memory if cuda else math.inf
        )

    def begin(self, lr: float | None) -> None:
        if self._updates is not None and self.optimizer is not None:
            set_learning_rate(self.optimizer, lr or 0.0)
            self._updates.begin(updates=lr is not None)

        if self._qk_clip is not None:
            self._qk_clip.begin(self.device)

    def passes(self, step: int) -> tuple[str, ...]:
        assert self._passes is not None, "an engine built with train=False cannot step"
        return self._passes.begin(step)

    def begin_pass(self, kind: str) -> None:
        self._pass = kind

    def end_pass(self, kind: str, valid: Tensor) -> None:
        assert self._passes is not None
        self._passes.end(kind, valid)
        self._pass = ""

    def use(self, train: TrainConfig) -> None:
        assert self.optimizer is not None
        self._z_loss, self._grad_clip = train.z_loss, train.grad_clip
        set_weight_decay(self.optimizer, decay_now(train))

    def _total_norm(self) -> Tensor:
        return to_device(total_norm(self._parameters.values()), self.device)

    def step(self, lr: float, *, largest_norm: float = math.inf) -> Tensor:
        assert self.optimizer is not None and self._passes is not None, "an engine built with train=False cannot step"
        if self._updates is not None:
            norm = self._updates.finish()
            self.matrices.scale_rows(self.matrices.update(refused(norm)))
            return norm
        parameters = self._parameters.values()
        norm = self._passes.checked(self._total_norm())
        # The host updates offloaded shards, so it waits here for the norm.
        seen = norm.cpu() if self._offloaded else norm
        if self._grad_clip > 0:
            clip(parameters, self._grad_clip, seen)
        set_learning_rate(self.optimizer, lr)
        skipped = refused(seen, largest_norm).float()
        # The fused kernels read it beside the parameters, leave weights and moments alone and take the count back.
        found_inf = skipped.pin_memory() if self._offloaded else skipped
        setattr(self.optimizer, "found_inf", found_inf)  # noqa: B010 - torch declares no such attribute
        self.optimizer.step()
        self._after_update(self.optimizer, self._passes, refused(norm, largest_norm))
        self.clear_gradients()
        return norm.detach()

    def _after_update(self, optimizer: torch.optim.Optimizer, passes: Passes, skipped: Tensor) -> None:
        """What follows the optimizer's own update, but for a skipped one."""
        passes.finish(skipped)
        self.matrices.scale_rows(self.matrices.update(skipped))
        if self._qk_clip is not None:
            self._qk_clip.clip(skipped)
        if self._config.train.ema:
            update_average(optimizer, self._config.train.ema, skipped)

    def clear_gradients(self) -> None:
        if self._updates is not None:
            self._updates.stop()
        if self._passes is not None:
            self._passes.forget()
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self, *, optimizer: bool = True) -> dict[str, Tensor]:
        named = self.parameters()
        weights = named | self.buffers()
        found: dict[str, Tensor] = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
        if optimizer and self.optimizer is not None:
            for name, parameter in named.items():
                state = self.optimizer.state.get(parameter)  # not state[parameter]: a missing one would be made
                assert state, f"the optimizer has no state for {name}"
                for moment, value in state.items():
                    found[f"optim.{name}.{moment}"] = value
        return found

    def loaded(self, *, weights_alone: bool = False) -> None:
        """Drops parameters that an earlier pass gathered from the former values of `tensors`, and what followed from
        these."""
        if weights_alone and self.optimizer is not None:
            follow_weights(self.optimizer, self._config.train)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                if self._config.model.axes.stack.shared:
                    part.unshard()  # ends a gather ahead of the layers' last places, which nothing waited for
                part.reshard()
        self.matrices.derive()

    def gradients(self) -> dict[str, Tensor]:
        return {name: _whole(gradient) for name, gradient in self.gradient_shards().items()}

    def gradient_shards(self) -> dict[str, Tensor]:
        return {name: p.grad.detach() for name, p in self.parameters().items() if p.grad is not None}

    def gradient_norms(self) -> dict[str, Tensor]:
        return norms(self.gradient_shards())

    def whole(self, name: str) -> Tensor:
        return _whole(self.parameters()[name])


def data_parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module wrapped so that its gradients are averaged over ranks."""
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        # Weights are equal by construction (seeded by name), so nothing needs a broadcast at the start.
        init_sync=False,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


@torch.no_grad()
def _fill(tensor: Tensor, whole: Tensor) -> None:
    """Copies a value that every rank has whole into a tensor or this rank's part of it: no traffic, any world size."""
    value = whole.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
