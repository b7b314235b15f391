"""What cannot be right in the section `data`, each problem with the keys it is about."""

from collections.abc import Iterator

from stablelm.config import mixture, secret_rules
from stablelm.config.schema import DataConfig, ModelConfig
from stablelm.errors import ConfigError
from stablelm.import_path import function


def problems(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(sentence, key) for each mistake."""
    for name in data.storage:
        key = f"data.storage.{name}"
        scheme, _, option = name.partition(".")
        if scheme not in secret_rules.ENVIRONMENT:
            yield f"{key}: {scheme!r} is no store we read; options are named s3, gs, az, hf, http or https first", key
        elif not option:
            yield f"{key}: give an option of fsspec below the store, as in data.storage.s3.endpoint_url", key
    yield from mixture.problems(data)
    if data.text_column.strip() == "":
        yield "data.text_column is empty; name the key or column that holds the text", "data.text_column"
    yield from _dataset_problems(data)
    yield from _function_problems(data)


def _dataset_problems(data: DataConfig) -> Iterator[tuple[str, str]]:
    if data.source == "datasets" and data.path == "embedded" and not data.mixture:
        yield (
            "data.source=datasets needs a data.path: a name on the hub, a folder, or a builder such as csv",
            "data.source",
        )
    for name in data.dataset:
        if not name.isidentifier():
            key = f"data.dataset.{name}"
            yield f"{key} is no argument of load_dataset; give name, split, revision, data_files or data_dir", key


def _function_problems(data: DataConfig) -> Iterator[tuple[str, str]]:
    for key, path in (("data.filter", data.filter), ("data.map", data.map)):
        if path is None:
            continue
        if data.source == "shards":
            yield f"{key}={path} works on text, but data.source=shards holds tokens; leave it out", key
            continue
        try:
            function(path)
        except ConfigError as error:
            yield f"{key}={path}: {error}", key


def document_problems(data: DataConfig, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(sentence, keys) where masking of documents makes no sense; `model`: with its axes filled."""
    end = model.attention.document_end
    if data.document_mask and model.axes.shaping.active:
        yield (
            f"data.document_mask=true cuts a sequence into pieces, but model.attention.shaping="
            f"{model.attention.shaping} is solved for one sequence from its first token on; "
            "use data.document_mask=false",
            ("data.document_mask", "model.method"),
        )
    if end is not None and not data.document_mask:
        yield (
            f"model.attention.document_end={end} is set by data.document_mask=true; set that, or leave it out",
            ("model.attention.document_end", "data.document_mask"),
        )
