"""What to try, from the figures of a profile: each rule with its threshold and why that is the threshold."""

from collections.abc import Callable, Iterator

from stablelm.config.schema import Config
from stablelm.observe.profile import parts
from stablelm.observe.profile.table import Profile

NOTHING = "nothing stands out: no part takes more than its usual share."

DATA_WAIT = 0.05
"""Readers work ahead of the step, so that any wait means they are too slow; below a twentieth it may be chance."""
EXCHANGE = 0.15
"""With gathers ahead of their use most of an exchange is hidden; beyond this a tenth or more could be gained."""
UPDATE = 0.15
"""An update costs the same for any batch: at a usual micro-batch of thousands of tokens it is a few per cent."""
HEAD = 0.3
"""Above this the vocabulary, not the layers, decides the time of a step."""
SMALL_OPERATORS = 0.35
"""Norms, and what autograd and Python do between the parts, are a tenth to a third of a step of usual width."""
IDLE = 0.15
"""A GPU that idles for longer waits for the host to launch its operators."""
BETWEEN = 0.1
"""Evaluations and saves are meant to be a few per cent of a run."""
MATMUL_RATE = 0.4
"""Matmuls of a usual size reach 60 to 80 % of the limit; far below they are too small."""
MEMORY_FREE = 0.5
"""With half the memory free, activations can be kept or micro-batches doubled."""


def suggestions(profile: Profile, config: Config, memory_share: float | None) -> list[str]:
    """Sentences, most of them naming a key; `memory_share`: of the GPU's memory at the peak, None on a CPU."""
    found = [sentence for rule in RULES for sentence in rule(profile, config)]
    return [*found, *_of_memory(config, memory_share)] or [NOTHING]


def _data(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.WAIT)
    if share > DATA_WAIT:
        kind = ", data.worker_kind=process" if config.data.worker_kind == "thread" else ""
        yield (
            f"waiting for data takes {share:.0%} of the step: raise data.workers (now {config.data.workers}){kind}, or "
            "prepare the tokens once with data/prepare.py"
        )


def _exchange(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.COMMUNICATION)
    if share > EXCHANGE:
        yield (
            f"communication takes {share:.0%} of the step: give each rank more tokens between exchanges (a larger "
            "train.micro_batch_size with fewer micro-batches, or fewer ranks), or share less (engine.kind=ddp or hsdp, "
            "where the model fits)"
        )


def _update(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.OPTIMIZER)
    if share > UPDATE:
        yield (
            f"the optimizer takes {share:.0%} of the step, which does not depend on the batch: more tokens per step "
            "(train.global_batch_size, data.seq_len) spread it, and fsdp2 or zero1 divide it among ranks"
        )


def _head(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.HEAD)
    if share > HEAD:
        yield (
            f"head and loss take {share:.0%} of the step: a vocabulary of {config.model.vocab_size} is large for "
            f"{config.model.n_layers} layers of width {config.model.d_model}; a smaller tokenizer makes steps faster"
        )


def _launches(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.IDLE)
    if share > IDLE:
        compiled = "" if config.train.compile is True else "set train.compile=true, or "
        yield (
            f"the GPU idles for {share:.0%} of the step while the host launches operators: {compiled}raise "
            "train.micro_batch_size"
        )


def _small(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.NORMS, parts.OTHER)
    if share > SMALL_OPERATORS and config.train.compile is not True:
        yield (
            f"norms and what lies between the parts take {share:.0%} of the step: train.compile=true "
            "joins small operators, and larger micro-batches make them count less"
        )


def _between(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.share(parts.BETWEEN)
    if share > BETWEEN:
        yield (
            f"records, evaluation and saving take {share:.0%} of these steps: raise observe.every, "
            "observe.layers_every, evaluate.every or checkpoint.every, unless these steps happen to hold one of each"
        )


def _matmuls(profile: Profile, config: Config) -> Iterator[str]:
    share = profile.matmul_limit_share
    if 0 < share < MATMUL_RATE:
        yield (
            f"matmuls run at {share:.0%} of the limit: they are small; raise train.micro_batch_size (now "
            f"{config.train.micro_batch_size} x {config.data.seq_len} tokens), and keep widths at multiples of 64"
        )


def _of_memory(config: Config, share: float | None) -> Iterator[str]:
    if share is not None and share < MEMORY_FREE:
        first = "engine.recompute=none, or " if config.engine.recompute != "none" else ""
        yield (
            f"the peak is {share:.0%} of the GPU's memory: try {first}a larger train.micro_batch_size with fewer "
            "micro-batches"
        )


RULES: tuple[Callable[[Profile, Config], Iterator[str]], ...] = (
    _data, _exchange, _launches, _small, _matmuls, _update, _head, _between,
)  # fmt: skip
