"""The engine on DeepSpeed: ZeRO-1, 2 and 3, by `kind`."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stablelm import private_names
from stablelm.config.schema import Config, TrainConfig
from stablelm.engine import zero_shards
from stablelm.engine.after_step import Reparametrised, initial_tensors
from stablelm.engine.deepspeed_config import check, settings
from stablelm.engine.optimizers import decay_now, make_optimizer, refused, set_learning_rate, set_weight_decay
from stablelm.engine.process.compilation import compile_layers, limit_explained, settled, uncompiled
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name
from stablelm.engine.updates.ema import update_average
from stablelm.engine.updates.state import follow_weights
from stablelm.errors import ConfigError
from stablelm.model.attention.cache import KeyValueCache
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import roles
from stablelm.model.loss import LossSums, TokenScores
from stablelm.model.memory import recompute
from stablelm.model.token_loss import TokenLoss
from stablelm.optimizers.interface import GRADIENT


class DeepSpeedEngine:
    """Implements `engine.interface.Engine`. `config` is resolved; `train=False` builds no optimizer.

    The process group exists already. Under zero3 no rank ever holds more than its part of the model and one whole
    parameter; under zero1 and zero2 every rank holds the working weights whole.
    """

    def __init__(self, config: Config, kind: str, ranks: Ranks, *, train: bool = True):
        self.kind, self.device, config = kind, ranks.device, settled(config, kind, ranks.device)
        self._stage, self._world_size = int(kind.removeprefix("zero")), ranks.world_size
        self._z_loss, self._compiled = config.train.z_loss, bool(config.train.compile)
        self._train = config.train
        self._token_loss = TokenLoss(config.train.loss) if config.train.loss and train else None
        with torch.device("meta"):
            self.module = Decoder(config.model, str(config.train.precision))
        self.optimizer = _optimizer(self.module, config) if train else None
        self._groups = _names(self.optimizer, self.module) if self.optimizer else []
        recompute.apply(self.module.layers, config.engine.recompute, dropout=config.model.dropout)
        if config.train.compile:
            compile_layers(self.module.layers, config.model, config.engine.memory_budget)
            self.module.compiled_loss = ranks.device.type == "cuda"
        self._engine: Any = None
        if train or self._stage == 3:
            deepspeed = import_deepspeed(ranks)
            wanted = settings(config, self._stage, ranks.world_size, cuda=ranks.device.type == "cuda")
            self._materialise(config, ranks, deepspeed, wanted)
            self._engine = self._initialize(deepspeed, wanted)
            check(self._engine, wanted)
        else:
            self._materialise(config, ranks, None, {})
        self.matrices = Reparametrised(self.module)
        self.module.train(train)
        if self.optimizer is not None:
            names = {parameter: name for name, parameter in self.parameters().items()}
            self._slices = zero_shards.buffer_slices(self._engine.optimizer, self._stage, names)
            zero_shards.make_state(self.optimizer, self._masters(), config.train)
            self._largest_norm = math.inf
            self.optimizer.register_step_pre_hook(self._refuse)

    def _materialise(self, config: Config, ranks: Ranks, deepspeed: Any, wanted: dict[str, Any]) -> None:
        """Gives every parameter and buffer its seeded initial value, under zero3 one after the other in parts."""
        split = _splitter(deepspeed, wanted) if self._stage == 3 else None
        slots, buffers = _slots(self.module), self._allocate_buffers()
        for name, whole in initial_tensors(self.module, config, ranks):
            if name in buffers:
                buffers[name].copy_(whole)
                continue
            owner, leaf = slots[name]
            parameter = nn.Parameter(whole.to(self.device, getattr(owner, leaf).dtype))
            owner.register_parameter(leaf, parameter)
            if split is not None:
                split(parameter)

    def _allocate_buffers(self) -> dict[str, Tensor]:
        """Buffers on the device, unset, by portable name."""
        for part in self.module.modules():
            for leaf, buffer in part.named_buffers(recurse=False):
                setattr(part, leaf, torch.empty_like(buffer, device=self.device))
        return self.buffers()

    def _initialize(self, deepspeed: Any, wanted: dict[str, Any]) -> Any:
        given: dict[str, Any] = {}
        if self.optimizer is not None:
            named = self.parameters()
            for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"] = [named[name] for name in names]
            given["optimizer"] = self.optimizer
        return deepspeed.initialize(model=self.module, config=wanted, dist_init_required=False, **given)[0]

    def _masters(self) -> Any:
        return zero_shards.masters(self._engine.optimizer, self._stage)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by portable name; under zero3 empty outside the passes, with this rank's part in `ds_tensor`."""
        return {clean_name(name): parameter for name, parameter in self.module.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """What is state but not learned (the vectors of spectral norms), whole on every rank, by portable name."""
        return {clean_name(name): buffer for name, buffer in private_names.saved_buffers(self.module).items()}

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        last: bool = True,
        boundaries: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> LossSums:
        call = self.module if self._engine is None else self._engine
        with limit_explained(self._compiled):
            options = {"z_loss": self._z_loss, "token_loss": self._token_loss}
            return call(tokens, targets, **options, boundaries=boundaries, factors=factors)

    def logits(self, tokens: Tensor, columns: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        call = self.module if self._engine is None else self._engine
        with uncompiled(self._compiled):
            return call(tokens, cache=cache, logits_at=columns)

    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> TokenScores:
        call = self.module if self._engine is None else self._engine
        return call(tokens, targets, places=places)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Stage 1 adds gradients up on each rank until the last micro-batch; stages 2 and 3 keep only their part."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the loss is already divided by the tokens of all ranks.
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)

    def drawn(self, tokens: Tensor, draws: Tensor, *, boundaries: Tensor | None = None) -> Tensor:
        raise AssertionError("optimizers that draw targets are refused here")

    def begin(self, lr: float | None) -> None:
        """Nothing: no update comes before `step`."""

    def passes(self, step: int) -> tuple[str, ...]:
        """One: optimizers with others are refused here."""
        return (GRADIENT,)

    def begin_pass(self, kind: str) -> None:
        """Nothing."""

    def end_pass(self, kind: str, valid: Tensor) -> None:
        """Nothing."""

    def use(self, train: TrainConfig) -> None:
        assert self.optimizer is not None
        self._z_loss, self._engine.optimizer.clip_grad = train.z_loss, train.grad_clip
        set_weight_decay(self.optimizer, decay_now(train))

    def step(self, lr: float, *, largest_norm: float = math.inf) -> Tensor:
        """As in the protocol; DeepSpeed itself skips an update whose norm is not finite and gives infinity."""
        assert self.optimizer is not None, "an engine built with train=False cannot step"
        set_learning_rate(self.optimizer, lr)
        self._largest_norm = largest_norm
        self._engine.step()
        norm = self._norm()
        self._scale_rows(self.matrices.update(refused(norm, largest_norm)))
        if self._train.ema:
            update_average(self.optimizer, self._train.ema, refused(norm, largest_norm))
        self.clear_gradients()
        return norm

    def _scale_rows(self, factors: Mapping[str, Tensor]) -> None:
        """Multiplies rows or columns in the master weights, and publishes these; collective if there are any."""
        flats = self._masters() if factors else []
        for name, factor in factors.items():
            part = self._slices[f"{name}.weight"]
            places = torch.arange(part.start, part.start + part.length, device=factor.device)
            held = part.shard(flats[part.group]).local
            of_rows = factor.ndim == 1
            chosen = (
                factor.expand(part.shape[0])[places // part.shape[1]] if of_rows else factor[0, places % part.shape[1]]
            )
            held.mul_(chosen.to(held.device, held.dtype))
        if factors:
            self.loaded()

    def _norm(self) -> Tensor:
        """The global norm of the step under way or of the last one, from when DeepSpeed has computed it."""
        norm = private_names.gradient_norm_of(self._engine.optimizer)
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device).detach()

    def _refuse(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before each group's update: the norm is known by then, and the fused kernel reads the decision."""
        setattr(optimizer, "found_inf", refused(self._norm(), self._largest_norm).float())  # noqa: B010

    def clear_gradients(self) -> None:
        zero_shards.forget_gradients(self._engine.optimizer, self._stage)

    def tensors(self, *, optimizer: bool = True) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"model.{name}": buffer for name, buffer in self.buffers().items()}
        if self.optimizer is None:
            split = zero_shards.whole_shard if self._stage == 3 else Tensor.detach
            return found | {f"model.{name}": split(parameter) for name, parameter in self.parameters().items()}
        flats = self._masters()
        for name, place in self._slices.items():
            found[f"model.{name}"] = place.shard(flats[place.group])
            if optimizer:
                state = self.optimizer.state[flats[place.group]]
                for own, value in state.items():
                    found[f"optim.{name}.{own}"] = place.shard(value) if value.ndim else value
        return found

    def loaded(self, *, weights_alone: bool = False) -> None:
        if self.optimizer is not None:
            if weights_alone:
                follow_weights(self.optimizer, self._train)
            zero_shards.publish(self._engine.optimizer, self._stage)
        elif self._stage == 3:
            self._engine.optimizer.partition_all_parameters()
        self.matrices.derive()

    def _gradient_parts(self) -> dict[str, zero_shards.FlatShard]:
        """This rank's part of every gradient by name, before `step`; parts may be empty."""
        return zero_shards.gradient_shards(self._engine.optimizer, self._stage, self._slices)

    def gradient_shards(self) -> dict[str, Tensor]:
        return dict(self._gradient_parts())

    def gradients(self) -> dict[str, Tensor]:
        return gather(self._gradient_parts(), self.device)

    def gradient_norms(self) -> dict[str, Tensor]:
        shards = self._gradient_parts()
        squares = torch.stack([shard.local.double().square().sum() for shard in shards.values()]).to(self.device)
        dist.all_reduce(squares)
        return dict(zip(shards, squares.sqrt().cpu().unbind(), strict=True))

    def whole(self, name: str) -> Tensor:
        held = self.tensors(optimizer=False)[f"model.{name}"]
        return gather({name: held}, self.device)[name] if isinstance(held, zero_shards.FlatShard) else held.clone()


def gather(shards: dict[str, zero_shards.FlatShard], device: torch.device) -> dict[str, Tensor]:
    """Whole tensors of shards, on every rank; one collective."""
    sizes = [math.prod(shard.shape) for shard in shards.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    parts = flat.split(sizes)
    for part, shard in zip(parts, shards.values(), strict=True):
        part[shard.start : shard.start + len(shard.local)] = shard.local
    dist.all_reduce(flat)
    return {name: part.view(shard.shape) for part, (name, shard) in zip(parts, shards.items(), strict=True)}


def import_deepspeed(ranks: Ranks) -> Any:
    """The package, quiet, for the rank's device and on the process group that exists; ConfigError without it."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # srun sets no LOCAL_RANK; DeepSpeed takes the device from it.
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.kind=zero* needs DeepSpeed ({error}); pip install deepspeed, or use fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Names of collectives that DeepSpeed calls in their older form.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    private_names.without_own_kernels(deepspeed)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _splitter(deepspeed: Any, wanted: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What leaves each rank its part of a parameter that all have whole."""
    init = deepspeed.zero.Init(config_dict_or_path=wanted, dtype=torch.float32)

    def split(parameter: Any) -> None:
        private_names.make_zero3_parameter(init, parameter)
        parameter.partition()

    return split


def _slots(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module and attribute that hold each parameter, by portable name."""
    return {
        clean_name(f"{prefix}.{leaf}".lstrip(".")): (owner, leaf)
        for prefix, owner in module.named_modules()
        for leaf, _ in owner.named_parameters(recurse=False)
    }


def _optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Our optimizer over a model on the meta device, whose shapes are whole still; its state takes no memory."""
    return make_optimizer(dict(module.named_parameters()), roles(module), config.train, config.model)


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """The names in each group; the optimizer's state is dropped."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer.state.clear()
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
