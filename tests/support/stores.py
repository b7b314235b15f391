"""Object stores for the tests: fsspec's in memory, and moto's S3 on the loopback, with ways to make them fail."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import pytest

from stablelm.checkpoint.remote_path import RemotePath

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Runs an S3 server with the bucket `bucket`; yields the variables with which programs find it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import fsspec
    from fsspec.config import conf

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    before = dict(os.environ)
    os.environ |= KEYS
    conf["s3"] = {"endpoint_url": endpoint}
    # What the server holds belongs to the process and outlives it; clients are remembered by their arguments.
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=10).close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield {**KEYS, "FSSPEC_S3_ENDPOINT_URL": endpoint}
    finally:
        del conf["s3"]
        os.environ.clear()
        os.environ |= before
        server.stop()


def in_memory() -> RemotePath:
    """A fresh folder of the store that lives in this process."""
    return RemotePath(f"memory://{uuid.uuid4().hex}/run/checkpoints")


def all_objects(root: RemotePath) -> set[str]:
    """Names of all objects below that are no fencing tokens."""
    return {name for name in root.files() if not name.startswith("fence/")}


def rewrite(path: Any, content: bytes) -> None:
    """Puts other bytes in place of an object or a file."""
    if isinstance(path, RemotePath):
        path.fs.pipe_file(path.path, content)
    else:
        path.write_bytes(content)
