"""What of a checkpoint's configuration is believed: a checkpoint may come from anybody, so it is data.

Believed are the model, what its tokens mean, and text to evaluate on where that is the embedded corpus or a plain file
of this machine. All else has its default: whatever reaches a store, runs a function by import path, or makes a folder
needs the user's own configuration, or the user's word that this checkpoint is to be trusted. The lists below name what
is believed; a key that they do not name is not.
"""

import glob
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stablelm.config.keys import assemble, find, is_mapping, keys, values
from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.methods import catalogue
from stablelm.paths import is_hub_model

_VALUES = (
    "model.n_layers model.d_model model.n_heads model.kv_heads model.d_ff model.max_seq_len model.vocab_size "
    "model.dropout model.tie_embeddings model.stream_dtype model.stream model.placement model.norm model.norm_eps "
    "model.norm_alpha model.embedding_norm model.init model.reparam model.activation model.bias "
    "model.stack model.depth_drop model.gains "
    "model.attention.position model.attention.rope_base model.attention.qk_norm model.attention.logit_cap "
    "model.attention.value_residual model.attention.low_rank model.attention.document_end model.attention.shaping "
    "model.attention.gate model.attention.softmax model.attention.value_maps model.embedding_gradient_scale "
    "data.add_bos data.eos_token data.seq_len data.document_mask data.text_column data.text_unit data.bad_rows "
    "data.max_document_bytes "
    "train.precision train.compile train.global_batch_size train.optimizer train.betas train.ema "
    "evaluate.batches evaluate.micro_batch_size evaluate.average"
)
VALUES = frozenset(_VALUES.split())
"""Numbers, choices, and strings that are only compared; so are all options of our own methods."""
METHOD = "model.method"
METHOD_OPTIONS = "model.method_options"
TOKENIZER = "data.tokenizer"
LOCAL = frozenset({TOKENIZER, "data.validation", "data.validation_path"})
"""Paths: 'embedded' or plain local ones (see `is_plain`)."""
MOST = {
    "model.max_seq_len": 1 << 20,
    "data.seq_len": 1 << 20,
    "data.max_document_bytes": 1 << 30,
    "train.global_batch_size": 1 << 20,
    "evaluate.batches": 1 << 20,
    "evaluate.micro_batch_size": 1 << 20,
}
"""Numbers that weights and files do not bound: beyond these a model of any size would fill the memory."""
MOST_AT_ONCE = 1 << 20
"""Tokens of a micro-batch."""
OPTIONS = tuple(f"model.{section}." for section in catalogue.options())
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EMBEDDED = ("embedded", "embedded:train", "embedded:validation")


@dataclass(frozen=True)
class Believed:
    """`withheld`: what the checkpoint asks for beyond that and is not in `config`, by key or entry of a mapping."""

    config: Config
    withheld: Mapping[str, Any]

    def with_own(self, own: Loaded) -> "Believed":
        """With every key that the user's own configuration gives, but for the model, which the weights decide."""
        given = {key.name for name in own.origins if (key := find(name)[0]) and not key.name.startswith("model.")}
        mine = {name: value for name, value in values(own.config).items() if name in given and value is not None}
        left = {name: value for name, value in self.withheld.items() if _key(name) not in given}
        return Believed(assemble(values(self.config) | mine), left)


def believed(saved: Config) -> Believed:
    """The part of a checkpoint's configuration that is taken whoever wrote it."""
    taken: dict[str, Any] = {}
    withheld: dict[str, Any] = {}
    loaded = catalogue.is_loaded(saved.model.method)
    for name, value in values(saved).items():
        if value == keys()[name].default:
            continue
        if name == METHOD_OPTIONS and loaded:
            taken[name] = value
            continue
        if is_mapping(keys()[name].type):
            held = {entry: item for entry, item in value.items() if not _is_believed(name, entry, item)}
            withheld |= {f"{name}.{entry}": item for entry, item in held.items()}
            taken[name] = {entry: item for entry, item in value.items() if entry not in held}
        elif _is_believed(name, "", value):
            taken[name] = value
        else:
            withheld[name] = value
    return Believed(assemble(taken), withheld)


def excesses(config: Config, given: Collection[str] = ()) -> list[str]:
    """A sentence for each number that would fill the memory; `given`: keys whose value is the user's own."""
    found = [
        f"{name}={value} is above {MOST[name]}, the most that is believed of a checkpoint"
        for name, value in values(config).items()
        if name in MOST and name not in given and value is not None and _largest(value) > MOST[name]
    ]
    tokens = config.evaluate.micro_batch_size * config.data.seq_len
    both = {"evaluate.micro_batch_size", "data.seq_len"}
    if not found and tokens > MOST_AT_ONCE and not both <= set(given):
        found.append(
            f"evaluate.micro_batch_size={config.evaluate.micro_batch_size} with data.seq_len={config.data.seq_len} is "
            f"above {MOST_AT_ONCE} tokens at once, the most that is believed of a checkpoint"
        )
    return found


def _largest(value: int | Mapping[int, int]) -> int:
    return value if isinstance(value, int) else max(value.values())


def is_plain(path: str) -> bool:
    """Whether a path names the embedded corpus, or files of this machine that take no search to find.

    A pattern may stand in its last part. A path at which there is nothing is plain; FIFOs, devices and sockets are not.
    """
    if path in _EMBEDDED:
        return True
    local = os.path.expanduser(path.removeprefix("file://"))
    folder, name = os.path.split(local)
    if "://" in local or "::" in local or "{" in local or "\0" in local or "**" in name or glob.has_magic(folder):
        return False
    return not os.path.exists(local) or os.path.isfile(local) or os.path.isdir(local)


def _is_believed(name: str, entry: str, value: Any) -> bool:
    if name in VALUES:
        return True
    if name.startswith(OPTIONS):
        return True
    if name == METHOD:
        return isinstance(value, str) and (_NAME.fullmatch(value) is not None or catalogue.is_loaded(value))
    if name not in LOCAL or (name == TOKENIZER and is_hub_model(value)):
        return False
    if not keys()[name].holds_path(entry):
        return entry.partition(".")[2] == "text_column"  # of a validation set
    return all(isinstance(path, str) and is_plain(path) for path in (value if isinstance(value, list) else [value]))


def _key(name: str) -> str:
    key, _ = find(name)
    return key.name if key else name
