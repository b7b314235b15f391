"""A run directory made of another program's model: what starts runs from weights, evaluates, generates and exports.

It holds one checkpoint, of step 0 and without optimizer state. Tensors are read, scaled and written one at a time.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm import json_text
from stablelm.checkpoint.selection import CHECKPOINTS, IMPORTED
from stablelm.config import rules
from stablelm.config.identity import identity
from stablelm.config.keys import find, values
from stablelm.config.load import Loaded, dump, load
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError, StorageError
from stablelm.export import tokenizer_files
from stablelm.export.importing import import_scales
from stablelm.export.importing.source_folder import CONFIG, SourceFolder
from stablelm.export.importing.source_models import SourceModel, describe
from stablelm.methods import catalogue
from stablelm.new_files import rename_to_new, replace_file
from stablelm.small_files import read_small
from stablelm.tokenizers import Tokenizer, load_tokenizer
from stablelm.tokenizers.location import KEPT_TOKENIZERS

if TYPE_CHECKING:
    from collections.abc import Iterator


LONGEST_BY_DEFAULT = 2048
"""Of `data.seq_len`: a model may allow positions that no one trains at once."""
RESOLVED = "# What the keys of config.yaml became when the model was imported.\n"


@dataclass(frozen=True)
class Imported:
    """`path`: the run directory; `parameters`: how many; `added`: names of biases that the source lacks."""

    path: Path
    architecture: str
    config: Config
    parameters: int
    added: list[str]


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "pre_ln",
    tokenizer: str | None = None,
    overrides: Sequence[str] = (),
) -> Imported:
    """Writes `out`, which must not exist or be empty, from the folder `source` of a model as transformers saves it.

    `method`: what it is trained on as, with the same function; `tokenizer`: None for the one in the folder;
    `overrides`: `key=value` of what the source leaves open. Raises ConfigError, with nothing left behind, and
    StorageError where `out` cannot be written.
    """
    path = Path(out)
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ConfigError(f"--out {path} exists; name a directory that does not")
    loaded = load([], list(overrides))
    folder = SourceFolder(Path(source))
    found = describe(folder, loaded.config.model.max_seq_len)
    tokens = _tokenizer(folder, found, tokenizer, loaded)
    asked = _asked(loaded, found, method, path.absolute(), tokens)
    _refuse_obstacles(found, import_scales.for_import(asked.model))
    config = _resolved(asked, loaded, tokens)
    _write(path, folder, found, asked, config, tokens)
    added = sorted(name for name, origin in found.tensors.items() if origin is None)
    return Imported(path, str(folder.config["model_type"]), config, _parameters(config.model), added)


def _tokenizer(folder: SourceFolder, found: SourceModel, asked: str | None, loaded: Loaded) -> Tokenizer:
    """The tokenizer, which must fit the model: as requested, or the folder's, the file that transformers prefers.

    Documents begin with bos where its files put one before a text, unless data.add_bos is given.
    """
    data = loaded.config.data
    beside = (str(folder.path / name) for name in reversed(KEPT_TOKENIZERS) if (folder.path / name).exists())
    path = asked or next(beside, str(folder.path))
    tokens = load_tokenizer(path, key="--tokenizer", add_bos=data.add_bos, eos_token=data.eos_token)
    if "data.add_bos" not in loaded.origins and tokens.bos is not None and _begins(tokens):
        tokens = load_tokenizer(path, key="--tokenizer", add_bos=True, eos_token=data.eos_token)
    vocabulary = found.keys["vocab_size"]
    if tokens.pieces > vocabulary:
        raise ConfigError(
            f"tokenizer {path} has {tokens.pieces} pieces, and the model's embedding {vocabulary} rows; name the one "
            "that it was trained with by --tokenizer"
        )
    if found.eos and tokens.eos not in found.eos:
        ids = " or ".join(map(str, found.eos))
        raise ConfigError(
            f"tokenizer {path} ends a text with id {tokens.eos}, and {folder.path / CONFIG} says eos_token_id={ids}; "
            "name the one that the model was trained with by --tokenizer"
        )
    return tokens


def _begins(tokens: Tokenizer) -> bool:
    """Whether the tokenizer's files put its bos token before a text."""
    files = tokens.files()
    try:
        said = json_text.parse(files.get(tokenizer_files.SETTINGS, b"{}"), dict[str, Any]).get("add_bos_token")
    except ValueError:
        said = None
    if isinstance(said, bool) or tokenizer_files.JSON not in files:
        return said is True
    return tokenizer_files.around(files[tokenizer_files.JSON])[0] == [tokens.bos]


def _asked(loaded: Loaded, found: SourceModel, method: str, out: Path, tokens: Tokenizer) -> Config:
    """What config.yaml says: a run that starts from these weights. Raises ConfigError for keys that it contradicts."""
    catalogue.find(method)
    given = loaded.asked
    attention = replace(given.model.attention, **found.attention)
    model = replace(given.model, method=method, attention=attention, **found.keys)
    model = replace(model, options=import_scales.for_import(model).options)
    seq_len = given.data.seq_len if "data.seq_len" in loaded.origins else min(LONGEST_BY_DEFAULT, found.positions)
    kept = next(name for name in KEPT_TOKENIZERS if name in tokens.files())
    asked = replace(
        given,
        model=model,
        data=replace(
            given.data,
            tokenizer=str(out / kept),
            add_bos=tokens.add_bos,
            seq_len=seq_len,
        ),
        run=replace(given.run, dir=str(out), init_from=str(out)),
    )
    before, after = values(given), values(asked)
    for name, origin in loaded.origins.items():
        key, _ = find(name)
        if key is not None and before[key.name] != after[key.name]:
            raise ConfigError(f"{key.name}={before[key.name]} must be {after[key.name]} here; leave it out ({origin})")
    return asked


def _resolved(asked: Config, loaded: Loaded, tokens: Tokenizer) -> Config:
    """`asked` with what its keys became; of a length that is not said, the identity of step 0 has one step."""
    train = asked.train
    if train.steps is None and train.tokens is None:
        train = replace(train, steps=1)
    return rules.resolve(
        replace(asked, train=train),
        pieces=tokens.pieces,
        eos=tokens.eos,
        world_size=1,
        accelerate_precision=None,
        origins=loaded.origins,
    )


def _refuse_obstacles(found: SourceModel, model: ModelConfig) -> None:
    norms_of_heads = bool(found.attention.get("qk_norm"))
    reasons = import_scales.obstacles(model, norms_of_heads=norms_of_heads)
    if not reasons:
        return
    plain = ModelConfig()
    decided = replace(plain, attention=replace(plain.attention, **found.attention), **found.keys)
    fits = import_scales.fitting_methods(decided, norms_of_heads=norms_of_heads)
    raise ConfigError(
        f"under --method {model.method} no scale of the weights gives the same function ({'; '.join(reasons)}); "
        f"use one of {', '.join(fits)}"
    )


def _write(
    out: Path,
    folder: SourceFolder,
    found: SourceModel,
    asked: Config,
    config: Config,
    tokens: Tokenizer,
) -> None:
    import torch

    from stablelm.checkpoint import commit
    from stablelm.checkpoint.contents import expected_shapes
    from stablelm.checkpoint.fence import Fence
    from stablelm.export.importing.import_weights import ImportedWeights
    from stablelm.model.linear import make_dtypes

    shapes = expected_shapes(config.model, optimizer=False)
    dtype = make_dtypes(str(config.train.precision), config.model.stream_dtype).parameter
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    weights = ImportedWeights(folder, found, config.model, dtype)
    state = _state(config, tokens)
    with _staged(out) as staging:
        root = staging / CHECKPOINTS
        commit.save(
            Fence(root, 0, "import"), 0, tensors, state, dump(asked), shapes=shapes, group=None, read=weights.read
        )
        replace_file(staging / "config.yaml", dump(asked))
        replace_file(staging / "resolved.yaml", RESOLVED + dump(config))
        replace_file(staging / "identity.json", json.dumps(state["identity"], indent=1) + "\n")
        for name, content in tokens.files().items():
            replace_file(staging / name, content)
        replace_file(staging / IMPORTED, json.dumps(_origin(folder), indent=1) + "\n")


def _state(config: Config, tokens: Tokenizer) -> dict[str, Any]:
    return {
        "step": 0,
        "tokens": 0,
        "data": {"data_step": 0, "lanes": {}},
        "identity": identity(config, base_names=[], tokenizer_sha256=tokens.sha256),
    }


def _origin(folder: SourceFolder) -> dict[str, Any]:
    content = read_small(folder.path / CONFIG)
    return {
        "from": str(folder.path.absolute()),
        "model_type": folder.config["model_type"],
        "dtypes": folder.dtypes(),
        "config_sha256": hashlib.sha256(content).hexdigest(),
    }


@contextmanager
def _staged(out: Path) -> "Iterator[Path]":
    """A directory beside `out` that becomes it when all is written; on any failure nothing is left."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        staging.mkdir(parents=True)
        yield staging
        rename_to_new(staging, out)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        fix = "free space there or name another --out"
        if isinstance(error, StorageError):  # what to do about a run's checkpoints is another thing
            raise StorageError(str(error.args[0]).replace(str(staging), str(out)), fix) from error
        if isinstance(error, OSError):
            raise StorageError(f"--out {out} cannot be written ({error.strerror})", fix) from error
        raise


def _parameters(model: ModelConfig) -> int:
    from stablelm.methods.sizes import parameter_counts

    return parameter_counts(model)["total"]
