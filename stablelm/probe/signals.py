"""What of a model at its initialisation is compared with recorded runs: a few numbers, each bad at one end."""

import math
from dataclasses import dataclass

import numpy as np

from stablelm.probe.measure import Measured


@dataclass(frozen=True)
class Signals:
    """The numbers of one model at its start.

    `gradient_ratio`: norm of the gradient to the stream after layer 1 over that after the last. `token_cosine`: of the
    stream at the end. `excess_loss`: first loss minus ln(vocabulary), nats. `attention_entropy`: the smallest of a
    layer, as a share of that of uniform attention to earlier tokens. `sensitivity`: see `measure.Measured`. The others
    are of `changes.Growth`, after the update of the first steps: change of the output, growth of the stream, cosine,
    and how much the loss rises, nats.
    """

    gradient_ratio: float
    token_cosine: float
    excess_loss: float
    attention_entropy: float
    sensitivity: float
    update_output_change: float
    update_stream_growth: float
    update_token_cosine: float
    update_loss_rise: float


def signals_of(measured: Measured, *, vocab_size: int, seq_len: int) -> Signals:
    """Of a model that was measured with an update, over sequences of `seq_len` >= 2 tokens."""
    found, growth = measured.internals, measured.growth
    assert growth is not None and measured.sensitivity is not None
    uniform = float(np.log(np.arange(1, seq_len + 1)).mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(found.gradient_norm[1] / found.gradient_norm[-1])
    return Signals(
        gradient_ratio=ratio,
        token_cosine=float(found.token_correlation[-1]),
        excess_loss=measured.loss - math.log(vocab_size),
        attention_entropy=float(found.attention_entropy[1:].min()) / uniform,
        sensitivity=measured.sensitivity,
        update_output_change=growth.output_change,
        update_stream_growth=growth.stream_variance,
        update_token_cosine=growth.token_correlation,
        update_loss_rise=growth.loss - measured.loss,
    )
