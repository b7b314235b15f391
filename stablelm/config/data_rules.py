"""What cannot be right in the section `data`, each problem with the keys it is about."""

import re
from collections.abc import Iterator

from stablelm.config import mixture
from stablelm.config.schema import DataConfig, ModelConfig

# Names under which fsspec's stores take what must stay secret; config.yaml would carry it into the run directory.
SECRET = re.compile(r"key|secret|token|password|passwd|credential|connection_string|authorization", re.IGNORECASE)
HARMLESS = re.compile(r"(^|\.)anon$|key_?file$", re.IGNORECASE)
ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "http": "a netrc file named by NETRC",
    "https": "a netrc file named by NETRC",
}


def problems(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(sentence, key) for each mistake; no key where its value must not be shown."""
    for name in data.storage:
        key = f"data.storage.{name}"
        scheme, _, option = name.partition(".")
        if scheme not in ENVIRONMENT:
            yield f"{key}: {scheme!r} is no store we read; options are named s3, gs, az, hf, http or https first", key
        elif not option:
            yield f"{key}: give an option of fsspec below the store, as in data.storage.s3.endpoint_url", key
        elif SECRET.search(option) and not HARMLESS.search(option):
            yield (
                f"{key}: secrets do not belong in a configuration, which is copied into the run directory; "
                f"set {ENVIRONMENT[scheme]} in the environment",
                "",  # where it was given is not repeated: that may be an argument with the secret in it
            )
    yield from mixture.problems(data)
    if data.text_column.strip() == "":
        yield "data.text_column is empty; name the key or column that holds the text", "data.text_column"


def document_problems(data: DataConfig, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(sentence, keys) where masking of documents makes no sense; `model`: with its axes filled."""
    end = model.attention.document_end
    if data.document_mask and model.attention.shaping == "espa":
        yield (
            "data.document_mask=true cuts a sequence into pieces, but model.attention.shaping=espa solves "
            "its decay for one sequence from its first token on; use data.document_mask=false",
            ("data.document_mask", "model.method"),
        )
    if end is not None and not data.document_mask:
        yield (
            f"model.attention.document_end={end} is set by data.document_mask=true; set that, or leave it out",
            ("model.attention.document_end", "data.document_mask"),
        )
