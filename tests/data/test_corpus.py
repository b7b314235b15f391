import gzip
from pathlib import Path

import pytest

from stablelm.data import corpus
from stablelm.data.corpus import resolve
from stablelm.data.storage.options import braces
from stablelm.errors import ConfigError


def find(path: str | list[str], key: str = "data.path") -> list[str]:
    return resolve(path, key=key, cache="unused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.json.gz", "a.jsonl", "c.json.zst", "README.md", ".hidden.json", "d.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "z").mkdir()
    return tmp_path


def names(files: list[str]) -> list[str]:
    return [Path(file).name for file in files]


def test_a_folder_gives_its_text_files_by_name(folder: Path):
    assert find(str(folder)) == [str(folder / name) for name in ("a.jsonl", "b.json.gz", "c.json.zst", "d.json")]


def test_file_glob_braces_and_lists_are_sorted_by_base_name(folder: Path):
    assert find(str(folder / "b.json.gz")) == [str(folder / "b.json.gz")]
    assert names(find(f"{folder}/*.json*")) == ["a.jsonl", "b.json.gz", "c.json.zst", "d.json"]
    assert names(find(f"{folder}/{{d.json,b.json.gz}}")) == ["b.json.gz", "d.json"]
    other = folder / "z" / "aa.json"
    other.write_bytes(b"x")
    assert names(find([str(folder / "d.json"), str(other), f"{folder}/a*"])) == ["a.jsonl", "aa.json", "d.json"]


def test_a_file_url_is_a_local_path(folder: Path):
    assert find(f"file://{folder}/d.json") == [str(folder / "d.json")]
    assert corpus.is_local(str(folder))
    assert not corpus.is_local("https://host/x.json")


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find("~/d.json") == [str(folder / "d.json")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path):
    path = tmp_path / "a[1]{x,y}.json"
    path.write_bytes(b"x")
    assert find(str(path)) == [str(path)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain", ["plain"]),
        ("a{08..11}b", ["a08b", "a09b", "a10b", "a11b"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{x}", ["{x}"]),
    ],
)
def test_braces(text: str, words: list[str]):
    assert braces(text) == words


def test_c4_at_a_mirror_is_1024_urls_in_order():
    files = find("https://mirror.example/en/c4-train.{00000..01023}-of-01024.json.gz")
    assert len(files) == 1024
    assert files == sorted(files)
    assert files[-1] == "https://mirror.example/en/c4-train.01023-of-01024.json.gz"


def test_urls_are_sorted_by_base_name_without_host_and_query():
    files = find(["https://z.example/a.json.gz?part=9", "https://a.example/b.json.gz?part=1"])
    assert files == ["https://z.example/a.json.gz?part=9", "https://a.example/b.json.gz?part=1"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{tmp}/none.json", "does not exist"),
        ("{tmp}/none/", "does not exist"),
        ("{tmp}/none*.json", "no file matches"),
        ("{tmp}/{{d,none}}.json", "no file matches"),
        ("{tmp}/z", "holds no file named *.json.gz"),
        ("http://host/en/*.json.gz", "a web server cannot be asked for its files"),
        ("http://host/text.csv", "is of an unsupported file type"),
        ("ftp://bucket/a.json", "is in an unsupported store"),
        ("hf://allenai/c4/x.json", "write hf://datasets/<owner>/<name>"),
        ("embedded:test", "is not a split"),
        ("", "the path is empty"),
    ],
)
def test_entries_that_match_nothing(path: str, says: str, folder: Path):
    path = path.format(tmp=folder)
    with pytest.raises(ConfigError) as caught:
        find(path, key="data.validation.web")
    message = str(caught.value)
    assert message.startswith("data.validation.web: ")
    assert says in message
    assert "; " in message  # the mend
    assert "\n" not in message
    assert caught.value.exit_code == 78


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    """A folder as download tools and Spark leave it: two of its names are no files."""
    for name in ("part-0.parquet", "part-1.parquet"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "part-2.parquet").symlink_to("gone.parquet")
    (tmp_path / "part-3.parquet").mkdir()
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "form",
    ["{0}", "{0}/*.parquet", "{0}/*", "{0}/**", "{0}/part-{{0..3}}.parquet", "{0}/part-{{0,1,2,3}}.parquet", "list"],
)
def test_links_to_nothing_and_folders_named_like_files_are_all_named(holes: Path, form: str):
    path = [f"{holes}/part-{n}.parquet" for n in range(4)] if form == "list" else form.format(holes)
    with pytest.raises(ConfigError) as caught:
        find(path)
    message = str(caught.value)
    assert message.startswith("data.path: ") and "; " in message
    assert f"{holes}/part-2.parquet' (a link to 'gone.parquet', which does not exist)" in message
    assert f"{holes}/part-3.parquet" in message and "folder" in message
    assert "part-0" not in message and "part-1" not in message


def test_all_that_is_missing_is_named(folder: Path):
    with pytest.raises(ConfigError) as caught:
        find([f"{folder}/{{d,none,nil}}.json", f"{folder}/gone.json", f"{folder}/d.json"])
    message = str(caught.value)
    assert all(word in message for word in ("none.json", "nil.json", "gone.json")) and "/d.json" not in message


def test_an_empty_list():
    with pytest.raises(ConfigError, match=r"^data\.path: the list is empty; give"):
        find([])


def test_equal_base_names_are_refused(folder: Path):
    copy = folder / "z" / "d.json"
    copy.write_bytes(b"x")
    with pytest.raises(ConfigError) as caught:
        find([str(folder / "d.json"), str(copy)])
    assert "two files have the base name 'd.json'" in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "rename or remove one" in str(caught.value)


def test_embedded_is_the_split_that_the_key_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from stablelm.data.embedded import EmbeddedCorpus

    made = EmbeddedCorpus(["/c/a.json.gz"], ["/c/v.json.gz"], "/c/t.model")
    seen = []
    monkeypatch.setattr(corpus, "embedded", lambda cache: seen.append(cache) or made)
    assert find("embedded") == ["/c/a.json.gz"]
    assert find("embedded", key="data.validation.own") == ["/c/v.json.gz"]
    assert find("embedded:train", key="data.validation.own") == ["/c/a.json.gz"]
    own = tmp_path / "b.json.gz"
    own.write_bytes(gzip.compress(b"x"))
    assert find([str(own), "embedded"]) == ["/c/a.json.gz", str(own)]
    assert set(seen) == {"unused"}


def test_importing_the_corpus_imports_neither_torch_nor_datasets():
    import subprocess
    import sys

    code = "import sys, stablelm.data.corpus; print([m for m in ('torch', 'datasets', 'fsspec') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
