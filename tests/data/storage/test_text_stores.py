"""The same documents from every store and format: paths, globs, options, and what is said when one fails."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.httpserver import serve
from support.stores import s3_server

from stablelm.config.load import dump, load
from stablelm.config.rules import check
from stablelm.data import corpus, inspection
from stablelm.data.formats.file_rows import FileRows, document_text, documents
from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

TEXTS = [f"document {n} ünï " + "x" * (n % 50) for n in range(1000)]
LINES = "".join(json.dumps({"text": text, "body": text[::-1], "n": 1}) + "\n" for text in TEXTS).encode()


def table(texts=TEXTS, kind=None, group=100) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {"url": ["u" * 1000] * len(texts), "text": pa.array(texts, kind), "body": [str(t)[::-1] for t in texts]}
    pq.write_table(pa.table(columns), sink, row_group_size=group, use_dictionary=False, compression="none")
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.json": LINES,
    "b.json.gz": gzip.compress(LINES),
    "c.jsonl.zst": zstandard.compress(LINES),
    "d.parquet": table(),
    "e.parquet": table(kind=pa.large_string(), group=1000),
}


def quick(**options) -> ReadOptions:
    return ReadOptions(retry_budget=5, block=16 << 10, **options)


@pytest.fixture
def folder(tmp_path):
    for name, content in FORMATS.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(scope="module")
def bucket():
    import fsspec

    with s3_server() as variables:
        store = fsspec.filesystem("s3")
        for name, content in FORMATS.items():
            store.pipe_file(f"s3://bucket/en/{name}", content)
        store.pipe_file("s3://bucket/en/notes.txt", b"no text of ours")
        yield variables["FSSPEC_S3_ENDPOINT_URL"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_and_rows(folder, name):
    url = str(folder / name)
    assert list(documents([url], quick())) == TEXTS
    assert list(documents([url], quick(text_column="body"))) == [text[::-1] for text in TEXTS]
    rows = FileRows(url, room=0, options=quick())
    for wanted in (range(700, 720, 3), range(721, 724)):
        taken = rows.take(wanted)
        assert taken is not None
        assert [document_text(row, url=url) for row in taken] == [TEXTS[number] for number in wanted]
    rows = FileRows(url, room=0, options=quick())
    assert [len(rows.take(wanted) or []) for wanted in (range(990, 1010), range(1010, 1020))] == [10, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_over_http_and_s3(folder, bucket, name):
    with serve(folder) as server:
        assert list(documents([f"{server.url}/{name}"], quick())) == TEXTS
    assert list(documents([f"s3://bucket/en/{name}"], quick())) == TEXTS


@pytest.mark.parametrize(
    "path", ["s3://bucket/en/*", "s3://bucket/en", "s3://bucket/en/?.{json,json.gz,jsonl.zst,parquet}"]
)
def test_globs_and_folders_of_an_object_store(bucket, path):
    found = corpus.resolve(path, key="data.path", cache="unused", options=quick())
    assert found == [f"s3://bucket/en/{name}" for name in FORMATS]
    inspection.check(found, key="data.path")


def test_options_of_a_store_come_from_the_configuration(bucket, monkeypatch):
    from fsspec.config import conf

    monkeypatch.delitem(conf, "s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    given = [f"data.storage.s3.endpoint_url={bucket}", "data.storage.s3.anon=true"]
    config = load([], [*given, "data.storage.s3.config_kwargs.read_timeout=7"]).config
    options = ReadOptions.of(config.data)
    assert options.settings("s3a") == {"endpoint_url": bucket, "anon": True, "config_kwargs": {"read_timeout": 7}}
    assert options.settings("gs") == {}
    import fsspec

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    fsspec.filesystem("s3", endpoint_url=bucket).chmod("s3://bucket/en/a.json", acl="public-read")
    assert next(documents(["s3://bucket/en/a.json"], options)) == TEXTS[0]


def test_options_survive_being_written(tmp_path):
    config = load([], ["data.storage.s3.endpoint_url=http://h:1", "data.storage.s3.anon=true"]).config
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load([str(tmp_path / "config.yaml")], []).config == config
    nested = tmp_path / "nested.yaml"
    nested.write_text("data:\n  storage:\n    s3: {endpoint_url: 'http://h:1', anon: true}\n")
    assert load([str(nested)], []).config == config


@pytest.mark.parametrize(
    "name",
    [
        "s3.key",
        "s3.secret",
        "s3.token",
        "s3.client_kwargs.aws_secret_access_key",
        "az.account_key",
        "hf.token",
        "az.connection_string",
        "http.headers.Authorization",
        "az.sas_token",
        "gs.password",
    ],
)
def test_secrets_are_refused_without_being_shown(name):
    loaded = load([], [f"data.storage.{name}=hush-hush"])
    with pytest.raises(ConfigError, match=r"secrets do not belong in a configuration.*in the environment") as caught:
        check(loaded.config, 1, None, loaded.origins)
    assert f"data.storage.{name}: " in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["s3.anon", "s3.endpoint_url", "s3.requester_pays", "gs.project", "az.account_name"])
def test_other_options_are_not(name):
    check(load([], ["train.steps=1", f"data.storage.{name}=a"]).config, 1, None)


@pytest.mark.parametrize(
    ("name", "says"), [("ftp.host", "'ftp' is no store we read"), ("s3", "give an option of fsspec below the store")]
)
def test_options_without_a_store(name, says):
    with pytest.raises(ConfigError, match=says):
        check(load([], [f"data.storage.{name}=a"]).config, 1, None)


@pytest.mark.parametrize(
    ("path", "package", "extra"),
    [("s3://b/*", "s3fs", "s3"), ("gs://b/a.json", "gcsfs", "gcs"), ("abfs://b/*", "adlfs", "azure")],
)
def test_a_missing_package_is_named(monkeypatch, path, package, extra):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}; .*pip install 'stablelm\[{extra}\]'"):
        corpus.resolve(path, key="data.path", cache="unused", options=quick())


def test_a_store_with_nothing_that_matches(bucket):
    with pytest.raises(ConfigError, match=r"data\.path: nothing in the store matches 's3://bucket/de/\*'"):
        corpus.resolve("s3://bucket/de/*", key="data.path", cache="unused", options=quick())
    with pytest.raises(ConfigError, match=r"cannot be listed|nothing in the store matches"):
        corpus.resolve("s3://absent/de", key="data.path", cache="unused", options=quick())
    with pytest.raises(DataError, match=r"s3://bucket/en/absent\.json: the file no longer exists"):
        list(documents(["s3://bucket/en/absent.json"], quick()))


def test_a_table_is_read_by_ranges_of_its_text_column(folder):
    (folder / "big.parquet").write_bytes(table(TEXTS * 4))
    size = (folder / "big.parquet").stat().st_size
    with serve(folder) as server:
        rows = FileRows(f"{server.url}/big.parquet", room=0, options=quick())
        taken = rows.take(range(3500, 3510))
        assert [row for _, row in taken or []] == [TEXTS[n] for n in range(500, 510)]
        ranges = [request.rsplit("=", 1)[1].split("-") for request in server.requests if "bytes=" in request]
        assert sum(int(last) - int(first) + 1 for first, last in ranges) < size / 10


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (table(), {"text_column": "txt"}, r"has no column 'txt' but 'url', 'text', 'body'; set data\.text_column"),
        (table([1, 2]), {}, r"column 'text' holds int64, not text"),
        (table(["a", None, "b"], pa.string()), {}, r"row 2: no value under 'text'"),
        (table()[:-9] + b"\0" * 9, {}, "damaged or not a parquet file"),
        (b"PAR1" + bytes(40), {}, "damaged or not a parquet file"),
    ],
)
def test_a_table_that_is_wrong(tmp_path, content, options, says):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(documents([str(path)], ReadOptions(retry_budget=0, **options)))
    if "row 2" not in says:  # only the first row is looked at before the start
        with pytest.raises(ConfigError, match=says):
            inspection.check([str(path)], key="data.path", options=ReadOptions(**options))


def test_an_empty_table_and_row_counts(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(table([], pa.string()))
    assert list(documents([str(path)], quick())) == []
    path.write_bytes(table(TEXTS[:7], group=2))
    with pytest.raises(ConfigError, match="holds 7; set at most 7 lanes"):
        inspection.check_lanes([str(path)], 8)
