"""`data.source: datasets`: any form that load_dataset opens, in one order whatever reads it, with filter and map."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.httpserver import FaultyServer
from support.letters import LetterTokenizer, write_rows

from stablelm.config.data_rules import problems
from stablelm.config.schema import DataConfig
from stablelm.data import inspection
from stablelm.data.corpus import resolve
from stablelm.data.formats import dataset_files
from stablelm.data.formats.file_rows import documents, rows_from
from stablelm.data.formats.tables import DatasetFile
from stablelm.data.loader import Loader
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError

TEXTS = [f"{n}: ünï" + "x" * (n * 7 % 53) + "." for n in range(119)]
PARTS = (range(40), range(40, 73), range(73, 119))
FORMS = ("json.gz", "parquet", "arrow", "saved", "csv", "text", "list")
SHARDED = ("arrow", "csv")
LANES = BATCH = 24
FUNCTIONS = """
def even(row):
    return int(row["text"].split(":")[0]) % 2 == 0

def nothing(row):
    return False

def shout(row):
    return {"text": row["text"].upper()}

def other(row):
    return {"text": None}

def fails(row):
    return row["none"]

number = 3
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture
def functions(tmp_path, monkeypatch) -> str:
    """Name of a module of the user's."""
    name = f"functions_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, str]:
    """The same documents in each form: its data.path."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        (root / form).mkdir()
    for index, part in enumerate(PARTS):
        texts, name = [TEXTS[n] for n in part], f"part-{index}"
        write_rows(root / "json.gz" / f"{name}.json.gz", texts)
        table = pa.table({"text": texts, "number": list(part)})
        parquet.write_table(table, root / "parquet" / f"{name}.parquet", row_group_size=7)
        with pa.ipc.new_stream(root / "arrow" / f"{name}.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
        rows = "".join(f'"{text}";{n}\n' for text, n in zip(texts, part, strict=True))
        (root / "csv" / f"{name}.csv").write_text("text;number\n" + rows)
        (root / "text" / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
        (root / "list" / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(root / "saved"), num_shards=3)
    paths = {form: str(root / form) for form in FORMS}
    paths["saved"] = f"arrow?data_files={root}/saved/*.arrow"
    paths["csv"] = f"csv?data_files={root}/csv/*.csv&sep=;"
    return paths


def config(path: str | list[str], folder: Path, **keys: Any) -> DataConfig:
    given = {"seq_len": 16, "lanes": LANES, "shuffle_block": 4, "cache": str(folder / "cache"), "retry_budget": 0.0}
    return DataConfig(source="datasets", path=path, **(given | keys))


def find(data: DataConfig) -> list[str]:
    return inspection.find(data, LetterTokenizer(), tokens=17, lanes=data.lanes)[""]  # type: ignore[arg-type]


def start(files: list[str], data: DataConfig, world: int, state: dict | None) -> list[Loader]:
    loaders = []
    for rank in range(world):
        each = Loader(files, LetterTokenizer(), data, seed=5, global_batch_size=BATCH, rank=rank, world_size=world)
        if state is not None:
            each.load(json.loads(json.dumps(state)))
        loaders.append(each)
    return loaders


def read(loaders: list[Loader], steps: int) -> list[list]:
    """Rows of each step in global order."""
    got = []
    for _ in range(steps):
        rows: list = [None] * BATCH
        for rank, each in enumerate(loaders):
            batch = each.next()
            rows[rank :: len(loaders)] = list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
        got.append(rows)
    return got


def union(loaders: list[Loader]) -> dict:
    """What a checkpoint holds; the loaders are closed."""
    states = [each.state() for each in loaders]
    for each in loaders:
        each.close()
    return {"data_step": states[0]["data_step"], "lanes": {k: v for state in states for k, v in state["lanes"].items()}}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_documents(forms, form, tmp_path):
    data = config(forms[form], tmp_path)
    files = find(data)
    assert len(files) == 3
    assert list(documents(files, ReadOptions.of(data))) == TEXTS
    ours = form in ("json.gz", "parquet")
    assert all(("://" not in file) == ours for file in files)
    for row in (0, 6, 32):
        first, rows = rows_from(files[1], row, ReadOptions.of(data))
        assert ours or (first, next(rows)) == (row, (row + 1, TEXTS[40 + row]))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("form", SHARDED)
def test_the_order_is_that_of_files_whatever_reads_them(forms, form, packing, tmp_path):
    names = find(config(forms["json.gz"], tmp_path))
    plain = config("unused", tmp_path, packing=packing, workers=0)
    # Shards are named like the files of the reference, so that their order is the same.
    files = [
        replace(DatasetFile.of(url), name=Path(name).name).url
        for url, name in zip(find(config(forms[form], tmp_path)), names, strict=True)
    ]
    whole = start(names, plain, 1, None)
    reference = read(whole, 14)
    union(whole)
    for world, workers in ((1, 0), (1, 2), (2, 1), (3, 2), (4, 0)):
        data = replace(plain, workers=workers)
        loaders = start(files, data, world, None)
        got = read(loaders, 4)
        for steps in (3, 7):  # resumed twice, each time by another number of processes
            state, world = union(loaders), {1: 3, 2: 4, 3: 2, 4: 1}[world]
            loaders = start(files, data, world, state)
            got += read(loaders, steps)
        assert max(epoch for epoch, *_ in union(loaders)["lanes"].values()) >= 1
        assert got == reference


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("form", ["json.gz", "parquet", "csv"])
def test_filter_and_map(forms, form, packing, functions, tmp_path):
    wanted = [text.upper() for n, text in enumerate(TEXTS) if n % 2 == 0]
    data = config(
        forms[form], tmp_path, packing=packing, workers=0, filter=f"{functions}:even", map=f"{functions}:shout"
    )
    assert not list(problems(data))
    files = find(data)
    assert list(documents(files, ReadOptions.of(data))) == wanted
    whole = start(files, data, 1, None)
    reference = read(whole, 9)
    union(whole)
    letters = {chr(token) for step in reference for row in step for token in row[0]}
    assert "x" not in letters and "X" in letters
    loaders, got = start(files, replace(data, workers=2), 2, None), []
    for _ in range(9):  # resumed at every step
        got += read(loaders, 1)
        loaders = start(files, data, 3, union(loaders))
    union(loaders)
    assert got == reference


@pytest.mark.parametrize("form", ["json.gz", "csv"])
def test_worker_processes_know_the_shards_and_the_functions(forms, form, functions, tmp_path):
    data = config(forms[form], tmp_path, workers=0, filter=f"{functions}:even", map=f"{functions}:shout")
    files = find(data)
    whole = start(files, data, 1, None)
    reference = read(whole, 3)
    union(whole)
    loaders = start(files, replace(data, workers=2, worker_kind="process"), 1, None)
    got = read(loaders, 3)
    union(loaders)
    assert got == reference


def test_files_have_filters_too_and_nothing_left_is_an_error(forms, functions, tmp_path):
    data = replace(config(f"{forms['json.gz']}/*.json.gz", tmp_path, workers=0), source="files")
    kept = replace(data, filter=f"{functions}:even")
    assert list(documents(find(kept), ReadOptions.of(kept))) == TEXTS[::2]
    empty = replace(data, filter=f"{functions}:nothing")
    with pytest.raises(DataError, match="has no document in its share"):
        read(start(find(data), empty, 1, None), 1)
    for name, says in (
        ("fails", r"part-0.json.gz, row 1: data.map=.* failed with KeyError"),
        ("other", "no text under"),
    ):
        with pytest.raises(ConfigError, match=says):
            find(replace(data, map=f"{functions}:{name}"))


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_more_lanes_than_rows(forms, form, tmp_path):
    data = config(forms[form], tmp_path, lanes=3 * 33 + 1)
    with pytest.raises(ConfigError, match=r"34 documents from each, but .*part-1.* holds 33; set at most 99 lanes"):
        find(data)


def test_functions_that_are_wrong(functions):
    for path, says in {
        "no path": "not an import path; write package.module:name",
        "none_such.module:function": "cannot be imported (ModuleNotFoundError",
        f"{functions}:missing": "does not define missing",
        f"{functions}:number": "is a int, not a function",
    }.items():
        [(sentence, key)] = problems(DataConfig(filter=path))
        assert key == "data.filter"
        assert says in sentence
    [(sentence, _)] = problems(DataConfig(source="shards", map=f"{functions}:shout"))
    assert "leave it out" in sentence


def test_paths_and_arguments():
    data = DataConfig(
        source="datasets", path="allenai/c4", dataset={"name": "en", "split": "train", "revision": "1234"}
    )
    [url] = inspection.paths(data).values()
    asked = dataset_files.DatasetRequest.of(str(url))
    assert (asked.path, asked.split, asked.arguments) == ("allenai/c4", "train", {"name": "en", "revision": "1234"})
    for path, split, name in (
        ("allenai/c4", "validation", "en"),
        ("allenai/c4?name=realnewslike", "validation", "realnewslike"),
        ("allenai/c4?split=test", "test", "en"),
        ("json?data_files=a+b%26c.json", "train", "en"),
    ):
        asked = dataset_files.DatasetRequest.of(str(inspection.asked(data, path, split="validation")))
        assert (asked.split, asked.arguments["name"]) == (split, name)
    assert asked.arguments["data_files"] == "a+b&c.json"
    for path in ("embedded", "hf://datasets/a/b/*.json"):
        assert inspection.asked(data, path, split="train") == path
    listed = replace(data, dataset={"data_files": ["a b.csv", "c.csv"], "sep": "\t", "header": 0, "quoting": True})
    asked = dataset_files.DatasetRequest.of(str(inspection.asked(listed, "csv", split="validation")))
    assert asked.split == "train"
    assert asked.arguments == {"data_files": ["a b.csv", "c.csv"]}
    assert asked.options == {"sep": "\t", "header": 0, "quoting": True}
    [(sentence, key)] = problems(DataConfig(source="datasets"))
    assert (key, "needs a data.path" in sentence) == ("data.source", True)


def test_a_mixture_of_datasets_and_files(forms, tmp_path):
    mixture = {
        "tables.path": forms["csv"],
        "tables.weight": 0.5,
        "lines.path": f"{forms['json.gz']}?split=train",
        "lines.weight": 0.25,
        "own.path": [f"file://{forms['json.gz']}/part-{index}.json.gz" for index in range(3)],
        "own.weight": 0.25,
    }
    data = replace(config("embedded", tmp_path, workers=0), mixture=mixture)
    assert not list(problems(data))
    sources = inspection.find(data, LetterTokenizer(), tokens=17, lanes=LANES)  # type: ignore[arg-type]
    assert {name: len(files) for name, files in sources.items()} == {"tables": 3, "lines": 3, "own": 3}
    whole = start(sources, data, 1, None)  # type: ignore[arg-type]
    reference = read(whole, 6)
    union(whole)
    loaders = start(sources, replace(data, workers=2), 2, None)  # type: ignore[arg-type]
    got = read(loaders, 2)
    loaders = start(sources, data, 3, union(loaders))  # type: ignore[arg-type]
    assert got + read(loaders, 4) == reference
    union(loaders)


def test_files_of_one_name_in_several_folders(tmp_path):
    for folder, texts in (("a", TEXTS[:9]), ("b", TEXTS[9:20])):
        (tmp_path / "two" / folder).mkdir(parents=True)
        write_rows(tmp_path / "two" / folder / "x.jsonl", texts)
    data = config(str(tmp_path / "two"), tmp_path, lanes=2)
    files = find(data)
    assert inspection.identity_names({"": files}, data) == ["a~x.jsonl", "b~x.jsonl"]
    assert list(documents(files, ReadOptions.of(data))) == TEXTS[:20]


WRONG = {
    "/no/such": "the folder '/no/such' does not exist",
    "csv": "the builder 'csv' needs files",
    "csv?data_files={csv}/no*.csv": "has no files of data",
    "csv?data_files={csv}/part-0.csv": "has no column 'text' but 'text;number'",
    "{json.gz}?split=test": "has no split 'test' but 'train'",
    "{json.gz}?name=en": "Available: ['default']",
    "{json.gz}?none=1": "has an option 'none'",
    "{arrow}?data_files=*.csv": "data_files",
    "{saved}": "was written by save_to_disk; give the builder 'arrow'",
}


@pytest.mark.parametrize("path", WRONG)
def test_what_cannot_be_opened(forms, path, tmp_path):
    folders = {form: str(Path(forms["text"]).parent / form) for form in FORMS}
    expected = WRONG[path]
    for form, folder in folders.items():
        path = path.replace(f"{{{form}}}", folder)
    with pytest.raises(ConfigError) as error:
        find(config(path, tmp_path))
    assert expected in str(error.value)
    assert str(error.value).startswith("data.path: ")
    assert "; " in str(error.value)


def test_a_column_of_numbers_and_one_without_values(forms, tmp_path):
    with pytest.raises(ConfigError, match="column 'number' holds int64, not text"):
        find(config(forms["csv"], tmp_path, text_column="number"))
    path = tmp_path / "gaps.csv"
    path.write_text("text,n\na,1\n,2\n")
    files = resolve(f"datasets://csv?data_files={path}", key="data.path", cache="unused")
    with pytest.raises(DataError, match=r"gaps.csv, row 2: no value under 'text'"):
        list(documents(files, ReadOptions()))


@pytest.fixture
def server(forms):
    server = FaultyServer(Path(forms["text"]).parent)
    yield server
    server.close()


@pytest.mark.parametrize("packed", [False, True])
def test_cuts_and_refusals_lose_and_repeat_no_row(server, packed, tmp_path):
    texts = [f"{n} " + str(n * 7919) * 40 for n in range(4000)]
    content = "".join(f"{text}\n" for text in texts).encode()
    name = "long.txt.gz" if packed else "long.txt"
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    server.folder = tmp_path
    server.failures, server.cuts, server.cut_after = 2, 4, 20_000
    options = ReadOptions(retry_budget=30, cache=str(tmp_path / "cache"))
    url = DatasetFile("text", name, f"{server.url}/{name}").url
    assert list(documents([url], options)) == texts
    assert server.failures == server.cuts == 0
    server.failures, server.status = 10**6, 503
    with pytest.raises(DataError, match=rf"{name}: unreadable at byte 0 for 0.3 s"):
        list(documents([url], replace(options, retry_budget=0.3)))
