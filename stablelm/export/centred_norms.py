"""A Pre-LN model as one with cheaper norms that computes the same: `stablelm export --norm pre_rms|crms`.

Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, NeurIPS 2023. A
layer norm sees of the stream only what is left without its mean, so the mean can be taken out of all that is written
onto it (tables, last matrices, their biases): then layer norms are root-mean-square norms (section 3.1). A vector of
mean zero is known by all its features but the last one: `crms` leaves that out of the stream, whose norms then count it
back (CRMSNorm, section 3.2), and takes gains and biases of norms into the maps that read them. Exact but for rounding;
a head that was the token table becomes a matrix of its own, since the table has changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.export.hf_model import writer
from stablelm.export.hf_model.writer import TrainedModel
from stablelm.export.weights import LazyTensor, constant
from stablelm.methods.roles import WRITING

OWN, PRE_RMS, CRMS = NORMS = ("own", "pre_rms", "crms")
TABLES = ("model.embedding.weight", "model.position.weight")
HEAD, EMBEDDING, FINAL = "head.weight", "embedding.weight", "norm_final"


def check(model: ModelConfig, norm: str) -> None:
    """Raises ConfigError where the norms of a model have no such equivalent."""
    if reasons := list(obstacles(model, norm)):
        raise ConfigError(f"--norm {norm} does not compute this model: {'; '.join(reasons)}; use --norm {OWN}")


def obstacles(model: ModelConfig, norm: str) -> Iterator[str]:
    """Why not all of the stream can have mean zero, or lack a feature."""
    axes = model.axes
    if axes.norm.standard != "layer":
        yield f"model.norm={axes.norm.name} is no layer norm, which alone leaves out the mean"
    if not (axes.placement.before_body and axes.placement.final):
        yield f"model.placement={axes.placement.name} leaves out norms in front of maps that read the stream"
    if axes.placement.on_branch or axes.placement.after_write or axes.placement.before_output:
        yield f"model.placement={axes.placement.name} has other norms than those that read the stream"
    if axes.stream.export_obstacle(model) is not None:
        yield f"model.stream={axes.stream.name} is not a sum of a skip and a branch"
    if model.embedding_norm:
        yield "model.embedding_norm writes onto the stream what has a mean of its own"
    if norm == CRMS and model.bias:
        yield "the bias of its final norm has no place in the head"


@dataclass(frozen=True)
class CentredNorms:
    """What `--format hf` writes of a model with such norms; `source` is one that `obstacles` lets pass."""

    source: TrainedModel
    norm: str

    @property
    def MODELLING_FILE(self):
        return writer.MODELLING_FILE

    def config(self, _: Any = None) -> dict[str, Any]:
        """The entries of config.json, as `export.formats.choice.Format` has it."""
        model = self.source.model
        found = {**writer.config(self.source), "norm_centred": False, "tie_word_embeddings": False}
        if self.norm == CRMS:
            found |= {"norm_compressed": True, "hidden_size": model.d_model - 1}
        return found

    def tensors(self, _: Any = None) -> Iterator[tuple[str, LazyTensor]]:
        """Every tensor by the modelling file's names."""
        found = dict(writer.tensors(self.source))
        found.setdefault(HEAD, self.source.weights.lazy(EMBEDDING))
        for name, tensor in found.items():
            *_, module, leaf = ("", *name.split("."))
            if name in TABLES:
                yield name, self._written(tensor, 1)
            elif module in WRITING and leaf in ("weight", "bias"):
                yield name, self._written(tensor, 0)
            elif self.norm == CRMS and module in ("norm_in", FINAL):
                yield name, constant((tensor.shape[0] - 1,), 1.0)
            elif self.norm == CRMS and (gain := self._gain(name)) is not None:
                yield name, _read(tensor, found[gain])
            else:
                yield name, tensor

    def _written(self, tensor: LazyTensor, dim: int) -> LazyTensor:
        """Without its mean over the stream's features, which lie along `dim`, and for `crms` without the last one."""
        centred = tensor.map(lambda x: x.sub_(x.mean(dim=dim, keepdim=True)))
        if self.norm != CRMS:
            return centred
        shape = list(tensor.shape)
        shape[dim] -= 1
        return centred.map(lambda x: x.narrow(dim, 0, shape[dim]), tuple(shape))

    def _gain(self, name: str) -> str | None:
        """The gain of the norm in front of the map whose matrix this is; None: it is none that reads the stream."""
        if name == HEAD:
            return f"model.{FINAL}.weight"
        stem, body, rest = name.partition(".body.")
        reads = body and rest.partition(".")[0] in ("query", "key", "value", "fc1", "gate")
        return f"{stem}.norm_in.weight" if reads and rest.endswith((".weight",)) and ".up." not in rest else None


def _read(matrix: LazyTensor, gain: LazyTensor) -> LazyTensor:
    """The matrix for a stream whose last feature, minus the sum of the others, is left out."""

    def change(weight):
        weight = weight * gain.values()
        return weight[:, :-1] - weight[:, -1:]

    return matrix.map(change, (matrix.shape[0], matrix.shape[1] - 1))
