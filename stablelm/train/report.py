"""What a finished run says of itself: its validation loss beside the simplest model of the same tokens."""

from collections.abc import Callable
from shlex import quote
from typing import Any

from stablelm.checkpoint.keep import CHECKPOINTS
from stablelm.config import mixture
from stablelm.config.schema import Config
from stablelm.config.trust import believed
from stablelm.data import validation
from stablelm.data.mixture import Mixture
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import DataError
from stablelm.evaluate.consent import needs_consent
from stablelm.evaluate.perplexity import bits_per_byte, in_words
from stablelm.train.job import Job
from stablelm.train.prepare import Prepared

UNIGRAM_TOKENS = 2_000_000


def comparison(prepared: Prepared, job: Job, message: Callable[[str], None]) -> dict[str, Any]:
    """Prints each validation set's final loss, bits per byte and unigram cross-entropy (nats); returns them."""
    config, corpora = job.config, prepared.corpora
    assert corpora is not None and config.train.steps is not None
    mixed = Mixture.of(mixture.sources(config.data), seed=config.run.seed) if config.data.mixture else None
    told: dict[str, Any] = {"unigram_loss": {}, "val_bits_per_byte": {}}
    for name, data in job.validation.items():
        loss = job.progress.val_loss[name]
        told["val_bits_per_byte"][name] = bits = bits_per_byte(loss, data.bytes_per_token)
        try:
            baseline = validation.unigram_cross_entropy(
                corpora.train,
                prepared.tokenizer,
                data,
                vocab=prepared.tokenizer.pieces,
                tokens=UNIGRAM_TOKENS,
                options=ReadOptions.of(config.data),
                shares=mixed.shares(config.train.steps) if mixed else None,
            )
        except DataError as error:
            # The run is complete and saved: a baseline that cannot be read must not fail it.
            message(f"validation {name}: loss {loss:.4f}, {in_words(bits)} (no unigram baseline: {error})")
            continue
        told["unigram_loss"][name] = baseline
        message(
            f"validation {name}: loss {loss:.4f}, {in_words(bits)}; a unigram model of the training "
            f"tokens has {baseline:.4f}: {baseline - loss:.4f} nats more"
        )
    return told


def where_to_look(config: Config) -> str:
    """Commands that show and use the run."""
    run_dir = config.run.dir.rstrip("/")
    elsewhere = config.checkpoint.dir not in (None, f"{run_dir}/{CHECKPOINTS}")
    # What is not done for any checkpoint is done by the word of whoever pastes this.
    own = f" --config {quote(f'{run_dir}/config.yaml')}" if elsewhere or needs_consent(believed(config)) else ""
    return (
        f"curves:   tensorboard --logdir {quote(f'{run_dir}/tensorboard')}\n"
        f"records:  {run_dir}/metrics.jsonl, {run_dir}/summary.json\n"
        f"evaluate: python launch/eval.py --checkpoint {quote(run_dir)}{own}"
    )
