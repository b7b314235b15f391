"""Secrets that a configuration carries, which would be copied into the run directory and every checkpoint."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from stablelm.config.keys import keys, values
from stablelm.config.schema import Config
from stablelm.redaction import HARMLESS_HEADERS, carries_secret, is_secret

WEB = "a netrc file named by NETRC (or headers by FSSPEC_HTTP='{\"headers\": {...}}')"
ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "http": WEB,
    "https": WEB,
}
# Names under which fsspec's stores take secrets, beside those that are secret anywhere.
OPTION = re.compile(r"key|secret|token|password|passwd|credential|connection_string|auth|cookie", re.IGNORECASE)
HARMLESS = re.compile(r"(^|\.)anon$|key_?file$", re.IGNORECASE)
SIGNED = re.compile(r"[?&](X-Amz-|AWSAccessKeyId)", re.IGNORECASE)


def problems(config: Config) -> Iterator[str]:
    """A sentence for each key that holds a secret, which is not shown; it names what to set in the environment."""
    for name, value in values(config).items():
        if value == keys()[name].default:
            continue
        if name == "data.storage":
            for option, inner in value.items():
                scheme = option.partition(".")[0]
                if _is_secret_option(option.partition(".")[2], inner):
                    yield _sentence(f"data.storage.{option}", ENVIRONMENT.get(scheme, "it"))
            continue
        for key, text in _texts(name, value):
            if name == "data.dataset" and is_secret(key, text):
                yield _sentence(key, ENVIRONMENT["hf"])
            elif carries_secret(text):
                yield _sentence(key, advice(text))


def advice(url: str) -> str:
    """What to set in the environment instead of a URL with a secret in it."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https") and SIGNED.search(url):
        return f"{ENVIRONMENT['s3']} and give the s3:// path, or {WEB}"
    return ENVIRONMENT.get(scheme, WEB)


def _sentence(key: str, variable: str) -> str:
    return (
        f"{key}: secrets do not belong in a configuration, which is copied into the run directory; "
        f"set {variable} in the environment"
    )


def _is_secret_option(option: str, value: Any) -> bool:
    """Whether an option of a store is one; all headers are, but those that every client sends."""
    if isinstance(value, Mapping):
        return any(_is_secret_option(f"{option}.{name}", inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(_is_secret_option(option, inner) for inner in value)
    before, _, last = option.rpartition(".")
    if before.rpartition(".")[2] == "headers":
        return last.lower() not in HARMLESS_HEADERS
    if OPTION.search(option) and not HARMLESS.search(option):
        return True
    return is_secret(last, value)


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(name, inner)
