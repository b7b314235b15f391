"""From what the user names to a loaded tokenizer: a file, a folder, or a model on the Hugging Face hub."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stablelm.errors import ConfigError
from stablelm.paths import HUB, is_hub_model
from stablelm.small_files import read_small
from stablelm.tokenizers.interface import Tokenizer
from stablelm.tokenizers.special_tokens import SETTINGS, SpecialTokens

HUGGING_FACE = "tokenizer.json"
SENTENCEPIECE = ".model"
KEPT_TOKENIZERS = ("tokenizer.model", HUGGING_FACE)
"""Names of the copy that a run directory keeps; `Tokenizer.files` has one of them."""
FORMS = "a SentencePiece .model file, a tokenizer.json, a folder with one of them, or a model on the hub (org/name)"


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    key: str = "data.tokenizer",
    add_bos: bool = False,
    eos_token: str | None = None,
) -> Tokenizer:
    """The tokenizer at a SentencePiece `.model` file, a `tokenizer.json`, a folder that holds one of them, or on the
    hub: `hf://org/name[@revision][/file]` or `org/name[@revision]` where no such local path exists.

    `add_bos`: documents begin with the bos token; `eos_token`: the content of the token that ends them, None for
    the tokenizer's own. Nothing in the files is run; no more is read than a tokenizer's files hold.
    Raises ConfigError under `key`.
    """
    name, special = os.fspath(path), SpecialTokens(key, add_bos, eos_token)
    if is_hub_model(name):
        return _from_hub(name, special)
    local = Path(name).expanduser()
    if local.is_dir():
        local = Path(_only(os.listdir(local), name, key, lambda file: str(Path(name, file))))
        name, local = str(local), local.expanduser()
    content = _read(local, name, key)
    # Of a file with another name, those beside it may be somebody else's.
    beside = [file for file in SETTINGS if local.name == HUGGING_FACE and (local.parent / file).exists()]
    return _made(content, name, special, {file: local.parent / file for file in beside})


def kept_tokenizer(run_dir: Path) -> str | None:
    """The copy that a run directory keeps: one file, or the one of which those beside it say what its special tokens
    are."""
    return next((str(path) for name in KEPT_TOKENIZERS if (path := run_dir / name).exists()), None)


def _from_hub(name: str, special: SpecialTokens) -> Tokenizer:
    from stablelm.tokenizers import hub_download

    model = hub_download.find(name, key=special.key)
    address = f"{HUB}{model.name}@{model.commit}"
    file = model.file or _only(model.files, name, special.key, lambda file: f"{address}/{file}")
    file = file.removeprefix(f"{address}/")
    path = model.fetch(file)
    content = _read(path, name, special.key)
    beside = [other for other in SETTINGS if file == HUGGING_FACE and other in model.files]
    return _made(content, name, special, {other: model.fetch(other, path.parent.name) for other in beside})


def _only(files: Sequence[str], folder: str, key: str, place: Callable[[str], str]) -> str:
    """Where the only tokenizer among a folder's files is. Raises ConfigError under `key` where there is not one."""
    found = sorted(file for file in files if file == HUGGING_FACE or file.endswith(SENTENCEPIECE))
    if len(found) == 1:
        return place(found[0])
    if found:
        listed = " and ".join(found)
        raise ConfigError(f"{key}: {folder!r} holds {listed}; name the one to use, such as {place(found[-1])!r}")
    if {"vocab.json", "merges.txt"} <= set(files):
        raise ConfigError(
            f"{key}: {folder!r} holds vocab.json and merges.txt, but no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise ConfigError(f"{key}: {folder!r} holds no tokenizer; give {FORMS}")


def _made(content: bytes, name: str, special: SpecialTokens, beside: Mapping[str, Path]) -> Tokenizer:
    if not name.endswith(".json") and not content.startswith(b"{"):
        from stablelm.tokenizers.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(content, path=name, special=special)
    from stablelm.tokenizers.hugging_face import HuggingFaceTokenizer

    settings = {file: _read(path, str(path), special.key) for file, path in beside.items()}
    return HuggingFaceTokenizer(content, settings, path=name, special=special)


def _read(path: Path, name: str, key: str) -> bytes:
    try:
        return read_small(path)
    except FileNotFoundError:
        raise ConfigError(f"{key}: {name!r} does not exist; give the path of {FORMS}, or 'embedded'") from None
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {name!r} ({error.strerror}); give {FORMS}") from None
