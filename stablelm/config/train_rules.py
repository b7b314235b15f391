"""Rules between the keys of `train.*`, `data.lanes` and the number of processes: sentences, and the keys to blame."""

from collections.abc import Callable, Iterator

from stablelm.config.schema import Config, ModelConfig, TrainConfig
from stablelm.errors import ConfigError
from stablelm.import_path import function
from stablelm.methods import sizes

LONGEST_SEARCH = 100_000


def precision(train: TrainConfig, accelerate_precision: str | None) -> Iterator[tuple[str, str]]:
    """What contradicts the launcher."""
    if train.precision and accelerate_precision and train.precision != accelerate_precision:
        yield (
            f"train.precision={train.precision} contradicts accelerate's mixed precision {accelerate_precision}; "
            "drop the flag or the key",
            "train.precision",
        )


def length(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What cannot be right of steps, tokens and learning rates."""
    train = config.train
    steps = train.steps
    if train.min_lr is not None and train.min_lr > train.lr:
        yield (
            f"train.min_lr={train.min_lr} is above train.lr={train.lr}; lower it or leave it out",
            ("train.min_lr", "train.lr"),
        )
    if train.tokens is None and steps is None:
        yield "train.steps and train.tokens are both missing; set one of them", ("train.steps", "train.tokens")
    if train.tokens is not None:
        needed = steps_of(train.tokens, train, config.data.seq_len)
        # A resolved configuration holds both, and they agree.
        if steps not in (None, needed):
            yield (
                f"train.steps={steps} contradicts train.tokens={train.tokens}, which makes it {needed}; "
                "set one of them and the other to null",
                ("train.steps", "train.tokens"),
            )
        steps = needed
    if steps is not None and train.cooldown_steps is not None and train.cooldown_steps > steps:
        yield (
            f"train.cooldown_steps={train.cooldown_steps} is more than the {steps} steps of the run; "
            "lower it or leave it out",
            ("train.cooldown_steps",),
        )


def float8(train: TrainConfig, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A `train.float8` that does nothing; `model` is resolved."""
    found = [product for sublayer in range(2 * model.n_layers) for product in sizes.products(model, sublayer)]
    least = train.float8_min_width
    if train.float8 == "none" or any(sizes.fits_float8(d_in, rows, least) for d_in, rows in found):
        return
    narrow = max(min(d_in, sum(rows)) for d_in, rows in found)
    fix = f"set train.float8_min_width={narrow} or less, " if narrow < least else "use other widths, "
    yield (
        f"train.float8={train.float8} changes nothing: no matrix of the layers has sides divisible by "
        f"{sizes.FLOAT8_MULTIPLE} and of at least train.float8_min_width={least}; {fix}or leave train.float8 out",
        ("train.float8", "train.float8_min_width"),
    )


def functions(config: Config) -> Iterator[tuple[str, str]]:
    """What cannot be imported of the user's own loss and metrics."""
    named = [("train.loss", config.train.loss), *(("observe.metrics", path) for path in config.observe.metrics)]
    for key, path in named:
        try:
            if path is not None:
                function(path)
        except ConfigError as error:
            yield f"{key}={path}: {error}", key


def sharpness(config: Config, accelerate_precision: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What `observe.sharpness_every` cannot be measured with."""
    every, given = config.observe.sharpness_every, config.train.precision or accelerate_precision
    if every and given == "bf16":
        yield (
            f"observe.sharpness_every={every} takes differences of gradients, which train.precision=bf16 rounds away; "
            "use train.precision=fp32, or leave observe.sharpness_every out",
            ("observe.sharpness_every", "train.precision"),
        )


def batches(config: Config, world_size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the number of processes does not divide."""
    lanes = config.data.lanes
    if lanes % world_size:
        worlds = around(world_size, lambda n: lanes % n == 0, lanes)
        others = around(lanes, lambda n: n % world_size == 0, lanes + world_size)
        yield (
            f"data.lanes={lanes} must be divisible by the number of processes, {world_size}; "
            f"start {either(worlds, 'process')}, or a new run with {either(others, 'lane')}",
            ("data.lanes",),
        )
    given = config.train.global_batch_size
    stages = (
        {"train.global_batch_size": given}
        if isinstance(given, int)
        else {f"train.global_batch_size.{step}": size for step, size in sorted(given.items())}
    )
    for name, batch in stages.items():
        yield from _stage(name, batch, list(stages.values()), config, world_size)


def _stage(
    name: str, batch: int, sizes: list[int], config: Config, world_size: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What does not divide one batch size, of the key `name`, of all the `sizes` of the run."""
    lanes, micro = config.data.lanes, config.train.micro_batch_size
    if batch % world_size:
        fits = around(batch, lambda n: n % world_size == 0, batch + world_size)
        worlds = around(world_size, lambda n: lanes % n == 0 and not any(size % n for size in sizes), batch)
        yield (
            f"{name}={batch} must be divisible by the number of processes, {world_size}; "
            f"use {either(fits)}, or start {either(worlds, 'process')}",
            (name,),
        )
    elif micro is not None and batch // world_size % micro:
        part = micro * world_size
        divisible = [size for size in sizes if size % world_size == 0]
        fits = around(micro, lambda n: not any(size % (world_size * n) for size in divisible), batch)
        others = around(batch, lambda n: n % part == 0, batch + part) if len(sizes) > 1 else []
        fix = f"use {either(fits)}" + (f", or {either(others)} sequences" if others else "")
        yield (
            f"train.micro_batch_size={micro} on {world_size} process{'es' * (world_size > 1)} does not divide "
            f"{name}={batch}; {fix}",
            ("train.micro_batch_size", name),
        )


def steps_of(tokens: int, train: TrainConfig, seq_len: int) -> int:
    """Whole steps that see at least `tokens` tokens, if no batch is skipped."""
    return train.batch_sizes.steps_for(-(-tokens // seq_len))


def around(value: int, fits: Callable[[int], bool], highest: int) -> list[int]:
    """The nearest numbers below and above `value`, from 1 to `highest`, that fit."""
    highest = min(highest, value + LONGEST_SEARCH)
    below = next((n for n in range(min(value - 1, highest), 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, highest + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def either(numbers: list[int], noun: str = "") -> str:
    """`2 or 4 heads`, `1 process`."""
    plural = "" if numbers[-1] == 1 else "es" if noun.endswith("s") else "s"
    return " or ".join(str(number) for number in numbers) + (f" {noun}{plural}" if noun else "")
