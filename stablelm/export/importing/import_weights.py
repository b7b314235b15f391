"""Our tensors made of another program's, one at a time."""

import re

import torch
from torch import Tensor

from stablelm.checkpoint.reader import MODEL_PREFIX
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.export.importing.import_scales import scale_of
from stablelm.export.importing.source_folder import SourceFolder
from stablelm.export.importing.source_models import SourceModel
from stablelm.methods import spectral
from stablelm.methods.axes import MATRICES
from stablelm.model.initialise import initial_value, role_of


class ImportedWeights:
    """The tensors of a model without `import_scales.obstacles`, in the dtype of its parameters."""

    def __init__(self, folder: SourceFolder, source: SourceModel, model: ModelConfig, dtype: torch.dtype):
        self._folder, self._source, self._model, self._dtype = folder, source, model, dtype
        reparam = model.axes.reparam
        self._beside = {*reparam.parameters(1, 1), *reparam.buffers(1, 1)}
        self._starts: dict[str, dict[str, Tensor]] = {}

    def read(self, name: str) -> Tensor:
        """The tensor of a checkpoint's name. Raises ConfigError where the source's cannot be used."""
        # Norms of separate inputs of a body's maps start alike.
        name = re.sub(r"\.norm_in_\d+\.", ".norm_in.", name.removeprefix(MODEL_PREFIX))
        stem, _, leaf = name.rpartition(".")
        if name in self._source.tensors:
            return self._replaced(name) if self._is_replaced(name) else self._plain(name)
        if leaf in self._beside:
            return self._start(stem)[leaf].to(self._dtype)
        return self._added(stem, leaf)

    def _is_replaced(self, name: str) -> bool:
        if not self._model.axes.reparam.replaces:
            return False
        role = role_of(name)
        sublayer = 2 * (role.layer or 0) + (".feedforward." in name)
        matrix = role.layer is not None and role.kind in MATRICES
        return matrix and self._model.axes.reparam.applies(self._model, sublayer)

    def _replaced(self, name: str) -> Tensor:
        """The matrix that stands, beside its gain, for the source's."""
        return self._model.axes.reparam.split(self._plain(name), self._model, None)["weight"]

    def _plain(self, name: str) -> Tensor:
        origin = self._source.tensors[name]
        if origin is None:
            whole = self._source.tensors[f"{name.removesuffix('.bias')}.weight"]
            assert whole is not None
            return torch.zeros(whole.shape[0], dtype=self._dtype)
        found, scale = self._folder.read(origin).to(self._dtype), scale_of(name, self._model)
        return found if scale == 1 else found.mul_(scale)

    def _start(self, stem: str) -> dict[str, Tensor]:
        """What stands beside a reparametrised matrix; kept, for it is small and takes a decomposition."""
        if stem not in self._starts:
            weight = self._plain(f"{stem}.weight")
            try:
                self._starts[stem] = self._beside_of(weight)
            except ValueError as error:
                raise ConfigError(
                    f"{self._folder.path}: {stem} cannot be reparametrised ({error}); use a method without "
                    "reparametrisation"
                ) from error
        return self._starts[stem]

    def _beside_of(self, weight: Tensor) -> dict[str, Tensor]:
        reparam = self._model.axes.reparam
        if not reparam.replaces:
            return reparam.starts(weight, self._model, spectral.start)
        found = reparam.split(weight, self._model, None)
        return {own: value for own, value in found.items() if own in self._beside}

    def _added(self, stem: str, leaf: str) -> Tensor:
        """A parameter that the stream adds to a layer or sub-layer."""
        stream, parts = self._model.axes.stream, stem.split(".")
        layer = int(parts[1])
        if len(parts) == 2:
            added = stream.in_layer(self._model, layer)
        else:
            added = stream.in_sublayer(self._model, 2 * layer + (parts[2] == "feedforward"))
        found = next(each for each in added if each.name == leaf)
        if found.std:  # what it is does not matter yet, but all zeros would not train
            name = f"{stem}.{leaf}"
            return initial_value(name, role_of(name), found.start.shape, self._model, seed=0).to(self._dtype)
        return torch.tensor(stream.plain_value(found), dtype=self._dtype)
