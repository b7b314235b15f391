"""From `datasets://<name>?...` to the files of a data set: whatever `datasets.load_dataset` opens.

JSON lines and parquet become plain paths and URLs, which our own readers seek in and retry; files of other
forms become shards that `datasets` reads (see `tables.DatasetFile`).
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from stablelm.data.formats import text_lines
from stablelm.data.formats.file_rows import record_of, texts
from stablelm.data.formats.tables import PLAIN, DatasetFile, library, storage_options
from stablelm.data.formats.text_lines import BadRow
from stablelm.data.storage.options import ReadOptions, base_name
from stablelm.errors import ConfigError, DataError

PREFIX = "datasets://"
# Arguments of load_dataset; any other is an option of its builder.
LOADING = ("name", "data_dir", "data_files", "split", "revision")
SETTLED = ("name", "version", "data_dir", "data_files", "description")
LINES = tuple(suffix + packed for suffix in (".json", ".jsonl") for packed in ("", ".gz", ".zst"))


def address(path: str, given: Mapping[str, Any], *, split: str) -> str:
    """`path` (name, folder or builder, perhaps with ?name=...) as one URL; its own arguments override `given`.

    'embedded' and URLs stay as they are. `split` is the default; files named by data_files are 'train'.
    """
    if path.partition(":")[0] == "embedded" or "://" in path:
        return path
    name, _, own = path.partition("?")
    arguments: dict[str, Any] = {**given, **_query(own)}
    arguments.setdefault("split", "train" if "data_files" in arguments else split)
    query = {key: value if isinstance(value, str | list) else json.dumps(value) for key, value in arguments.items()}
    return f"{PREFIX}{name}?{urlencode(query, doseq=True, safe='/:*,{}@[]', quote_via=quote)}"


@dataclass(frozen=True)
class DatasetRequest:
    """Arguments of load_dataset; `options` are the builder's."""

    path: str
    split: str
    arguments: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> "DatasetRequest":
        path, _, query = url.removeprefix(PREFIX).partition("?")
        given = {name: values if len(values) > 1 else values[0] for name, values in _query(query).items()}
        split = given.pop("split", "train")
        arguments = {name: value for name, value in given.items() if name in LOADING}
        options = {name: _value(value) for name, value in given.items() if name not in LOADING}
        return cls(os.path.expanduser(unquote(path)), str(split), arguments, options)


def _query(text: str) -> dict[str, list[str]]:
    """Arguments after a '?', where a '+' is one."""
    return parse_qs(text.replace("+", "%2B"), keep_blank_values=True)


def _value(text: str | list[str]) -> Any:
    """The value of a string that is a number, a boolean or null in JSON, else the string."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def expand(url: str, *, key: str, options: ReadOptions) -> list[str]:
    """The files of `datasets://<name, folder or builder>[?name=...&split=...&revision=...&data_files=...&...]`.

    Revisions on the hub are pinned in them. Raises ConfigError under `key` when there is no such data set,
    configuration or split, when the hub is out of reach or the first file has no text.
    """
    asked = DatasetRequest.of(url)
    builder, files = _found(asked, url, key, options)
    settings = _options(builder, key, url)
    names = _names(files)
    try:
        plain = _is_plain(builder.name, settings, files, options)
        if plain and names == [base_name(file) for file in files]:
            found = files
        else:
            # A card's types matter to datasets' own reading only.
            form, settings = (PLAIN, {}) if plain else (str(builder.name), settings)
            found = [DatasetFile(form, name, file, settings).url for name, file in zip(names, files, strict=True)]
        empty = not any(True for _ in texts(found[0], options))
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from error
    if empty:
        raise ConfigError(f"{key}: {files[0]!r} contains no row; remove it from the data set or download it again")
    return found


def _found(asked: DatasetRequest, url: str, key: str, options: ReadOptions) -> tuple[Any, list[str]]:
    datasets = library()
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as builders

    if asked.path in builders and not {"data_files", "data_dir"} & set(asked.arguments):
        raise ConfigError(f"{key}: the builder {asked.path!r} needs files; set data_files")
    if asked.path.startswith(("/", ".")) and not os.path.exists(asked.path):
        raise ConfigError(
            f"{key}: the folder {asked.path!r} does not exist; check the path, looked up from {os.getcwd()}"
        )
    if os.path.isfile(os.path.join(asked.path, "state.json")):
        raise ConfigError(
            f"{key}: {asked.path!r} was written by save_to_disk; give the builder 'arrow' with "
            f"data_files={os.path.join(asked.path, '*.arrow')}"
        )
    from stablelm.data.storage import hub  # with the hub's client

    if asked.path not in builders and not os.path.exists(asked.path):
        hub.reach(url, key=key)
    try:
        builder = datasets.load_dataset_builder(
            asked.path, storage_options=storage_options(options) or None, **asked.arguments, **asked.options
        )
        found = {
            str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()
        }
    # The package and the clients below it have no common error class: any failure means that it cannot be opened.
    except Exception as error:
        raise ConfigError(_sentence(error, asked, url, key)) from error
    if not any(found.values()):
        raise ConfigError(f"{key}: {url!r} has no files of data; check the folder or data_files")
    if asked.split not in found:
        raise ConfigError(
            f"{key}: {url!r} has no split {asked.split!r} but {', '.join(map(repr, found))}; set split to one of these"
        )
    return builder, found[asked.split]


def _sentence(error: Exception, asked: DatasetRequest, url: str, key: str) -> str:
    words = " ".join(str(error).split())
    local = os.path.isdir(asked.path) or "/" not in asked.path
    if local and isinstance(error, FileNotFoundError) and "Hub" not in words:
        return f"{key}: {url!r} has no such file ({words[:200]}); check the folder or data_files"
    if "BuilderConfig" in words and "not found" in words:
        return f"{key}: {url!r}: {words.rstrip('.')}; name one of these by name"
    if "Config name is missing" in words:
        return f"{key}: {url!r}: {words.split('Example')[0].strip().rstrip('.')}; name one by name"
    if unknown := re.search(r"unexpected keyword argument '(\w+)'|doesn't have a '(\w+)' key", words):
        option = unknown[1] or unknown[2]
        return f"{key}: {url!r}: neither load_dataset nor the builder of this form has an option {option!r}; remove it"
    from stablelm.data.storage import hub

    return hub.sentence(error, url, key)


def _options(builder: Any, key: str, url: str) -> dict[str, Any]:
    """What differs from the builder's defaults: set by the data set's card or by the request."""
    default = type(builder.config)()
    settings = {
        field.name: getattr(builder.config, field.name)
        for field in dataclasses.fields(builder.config)
        if field.name not in (*SETTLED, "features")
        and getattr(builder.config, field.name) != getattr(default, field.name)
    }
    if builder.info.features is not None:
        settings["features"] = builder.info.features.to_dict()
    try:
        return json.loads(json.dumps(settings))
    except TypeError as error:
        raise ConfigError(f"{key}: {url!r} has options that JSON cannot hold ({error}); remove them") from error


def _is_plain(builder: str, settings: dict[str, Any], files: list[str], options: ReadOptions) -> bool:
    """Whether our own readers find the same rows in these files. Raises DataError when the first is unreadable."""
    if set(settings) - {"features"}:
        return False
    if builder == "parquet":
        return all(base_name(file).endswith(".parquet") for file in files)
    if builder != "json" or not all(base_name(file).endswith(LINES) for file in files):
        return False
    # The builder also takes files that are one list, or one object over several lines.
    first = next(text_lines.lines_from(files[0], 0, options)[1], None)
    if first is None:
        return False
    try:
        record_of(*first, files[0])
    except BadRow:
        return False
    return True


def _names(files: list[str]) -> list[str]:
    """A name for each file: its base name, or what distinguishes it from the others where two share that."""
    names = [base_name(file) for file in files]
    if len(set(names)) < len(names):
        parts = [file.split("/") for file in files]
        shared = sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))
        names = ["~".join(each[shared:]) for each in parts]
    return [name.replace("?", "~") for name in names]
