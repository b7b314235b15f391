"""Indexes and tensor files that were made to harm: refused in one sentence, before memory or time is spent on them."""

import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.saved import blanks, save_toy, seal_anew, toy_tensors

from stablelm.checkpoint import selection
from stablelm.checkpoint.contents import problems
from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.checkpoint.reader import consolidate
from stablelm.errors import CheckpointError

FILE = "rank-00000-0.safetensors"
NAME = "model.embedding.weight"


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path / "tensors", toy_tensors(), None)
    return tmp_path / "tensors"


def refused(saved, reason, tensors=None):
    """Refuses all of it on the way to memory of little size, and leaves what it should fill alone."""
    tensors = blanks(toy_tensors()) if tensors is None else tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limit[1]))
    try:
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_tensors(saved, tensors, None)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def index_of(saved):
    return json.loads((saved / "index.json").read_text())


def piece(index, name=NAME):
    return index["tensors"][name]["pieces"][0]


def two_halves(index):
    """The embedding as two pieces, of which the second lies over the first."""
    entry = index["tensors"][NAME]
    entry["pieces"] = [{"file": FILE, "offsets": [row, 0], "sizes": [17, 16]} for row in (0, 15)]


def twice(index):
    index["tensors"][NAME]["pieces"] *= 2


INDEXES = {
    "no pieces": (lambda index: index["tensors"][NAME].update(pieces=[]), f"not complete .{NAME} incomplete"),
    "overlap": (two_halves, f"not complete .{NAME} incomplete"),
    "twice": (twice, "two pieces have one name"),
    "beyond the whole": (lambda index: piece(index).update(offsets=[1, 0]), "not inside"),
    "far beyond": (lambda index: piece(index).update(sizes=[1 << 62, 16]), "not inside"),
    "beyond an int": (lambda index: piece(index).update(sizes=[1 << 64, 16]), "less than"),
    "negative": (lambda index: piece(index).update(offsets=[-1, 0]), "greater than or equal to 0"),
    "fraction": (lambda index: piece(index).update(offsets=[0.5, 0]), "integer"),
    "text": (lambda index: piece(index).update(offsets=["0", 0]), "integer"),
    "columns": (lambda index: piece(index).update(sizes=[33, 8]), "not a range of the row-major order"),
    "other dimensions": (lambda index: piece(index).update(sizes=[33]), "not inside"),
    "many dimensions": (lambda index: index["tensors"][NAME].update(shape=[1] * 100), "at most 16 items"),
    "unknown dtype": (lambda index: index["tensors"][NAME].update(dtype="F128"), "Input should be 'F64'"),
    "unknown key": (lambda index: piece(index).update(code="x"), "Extra inputs are not permitted"),
    "missing key": (lambda index: piece(index).pop("file"), "Field required"),
    "another version": (lambda index: index.update(version=2), "Input should be 1"),
    "no tensors": (lambda index: index.update(tensors=[]), "should be an object"),
    "another directory": (lambda index: piece(index).update(file=f"../{FILE}"), "match pattern"),
    "an absolute path": (lambda index: piece(index).update(file="/etc/passwd"), "match pattern"),
    "another file": (lambda index: piece(index).update(file="index.json"), "match pattern"),
    "a name with a line": (lambda index: piece(index).update(file=f"{FILE}\n"), "match pattern"),
    "an absent file": (lambda index: piece(index).update(file="rank-00007-0.safetensors"), "rank-00007-0.* not exist"),
    "the header's dtype": (lambda index: index["tensors"]["optim.count"].update(dtype="F64"), "int64 here|float64"),
}


@pytest.mark.parametrize("lie", INDEXES)
def test_an_index_that_lies_is_refused(saved, lie):
    harm, reason = INDEXES[lie]
    index = index_of(saved)
    harm(index)
    (saved / "index.json").write_text(json.dumps(index))
    refused(saved, reason)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version":1,"tensors":' + b'{"a":' * 100_000,
        b"9" * 100_000,
        b'{"version":1,"version":1,"tensors":{}}',
        b'{"version":1,"tensors":{"a":1,"a":2}}',
        b'{"version":1,"tensors":{},"tensors":{}}',
        b'{"version":NaN,"tensors":{}}',
        pickle.dumps({"version": 1}),
    ],
    ids=range(12),
)
def test_an_index_that_is_none_is_refused(saved, content):
    (saved / "index.json").write_bytes(content)
    refused(saved, r"refused to read .*index\.json")


def test_a_piece_hidden_behind_another_of_its_name_is_refused(saved):
    text = (saved / "index.json").read_text()
    (saved / "index.json").write_text(text.replace('"tensors":{', '"tensors":{"optim.count":{},', 1))
    refused(saved, "'optim.count' is given twice")


def test_an_index_that_never_ends_is_refused(saved):
    os.truncate(saved / "index.json", 1 << 40)  # takes no space
    refused(saved, r"refused to read .*more than \d+ bytes")


def header_of(saved):
    content = (saved / FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(saved, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (saved / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def overlap(header):
    """Two tensors of one size in the same bytes."""
    header["optim.embedding.weight.exp_avg"]["data_offsets"] = header[NAME]["data_offsets"]


HEADERS = {
    "dtype": (lambda header: header[NAME].update(dtype="I32"), "does not agree"),
    "shape": (lambda header: header[NAME].update(shape=[16, 33]), "does not agree"),
    "missing": (lambda header: header.pop(NAME), "does not agree"),
    "more": (lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "not agree"),
    "overlap": (overlap, "not where they must be"),
    "huge": (lambda header: header[NAME].update(data_offsets=[0, 1 << 62]), "not where they must be"),
    "negative": (lambda header: header[NAME].update(data_offsets=[-8, 8]), "greater than or equal to 0"),
    "three": (lambda header: header[NAME].update(data_offsets=[0, 8, 16]), "at most 2 items"),
    "key": (lambda header: header[NAME].update(more=1), "Extra inputs are not permitted"),
    "metadata alone": (lambda header: [header.pop(name) for name in list(header) if name != "__metadata__"], "agree"),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies_is_refused(saved, lie):
    harm, reason = HEADERS[lie]
    header, data = header_of(saved)
    harm(header)
    write(saved, header, data)
    refused(saved, f"are damaged .{FILE}: .*{reason}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "longer"),
        (b"abc", "longer"),
        (struct.pack("<Q", 0), "longer"),
        (struct.pack("<Q", 1 << 63) + b"{}", "longer"),
        (struct.pack("<Q", 200) + b"{}", "longer"),
        (struct.pack("<Q", 4) + b"[1,2", ""),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"{}", "does not agree"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(saved, content, reason):
    (saved / FILE).write_bytes(content)
    refused(saved, f"are damaged .{FILE}: .*{reason}")


def test_names_twice_in_a_header_are_refused(saved):
    header, data = header_of(saved)
    text = json.dumps(header)
    write(saved, (text[:-1] + f',"{NAME}":{json.dumps(header[NAME])}}}').encode(), data)
    refused(saved, "twice")


@pytest.mark.parametrize("size", [-1, 1, 1 << 40])
def test_a_file_cut_short_or_long_is_refused(saved, size):
    os.truncate(saved / FILE, (saved / FILE).stat().st_size + size)
    refused(saved, f"are damaged .{FILE}: it has .* bytes instead of")


@pytest.mark.parametrize("name", ["index.json", FILE])
@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", ".", "absent", "pipe"])
def test_links_to_what_is_no_such_file_are_refused(saved, name, target):
    (saved / name).unlink()
    if target == "pipe":
        os.mkfifo(saved / name)
    else:
        (saved / name).symlink_to(target)
    refused(saved, name)


def test_a_malicious_pickle_in_any_file_is_not_executed(saved, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in (FILE, "index.json", ".metadata"):
        (saved / name).write_bytes(pickle.dumps(Malicious()))
        refused(saved, name if name != ".metadata" else "index.json")
    (saved / "index.json").unlink()
    refused(saved, "was saved by stablelm 0.1")
    assert not (tmp_path / "executed").exists()


def test_a_huge_tensor_that_no_file_holds_is_not_allocated(tmp_path):
    path = save_toy(tmp_path, 3).path
    index = index_of(path / "tensors")
    for entry in (index["tensors"][NAME], piece(index)):
        entry["shape" if "shape" in entry else "sizes"] = [1 << 40, 1 << 10]
    (path / "tensors/index.json").write_text(json.dumps(index))
    seal_anew(path)
    with pytest.raises(CheckpointError, match=r"does not agree with index\.json"):
        consolidate(str(path), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_checkpoints_of_the_earlier_format_are_named(tmp_path, saved):
    path = save_toy(tmp_path / "checkpoints", 3).path
    shutil.move(path / "tensors/index.json", path / "tensors/.metadata")
    seal_anew(path)
    words = "was saved by stablelm 0.1, .*with stablelm 0.1.0, the last version that does"
    for look in (
        lambda: load_tensors(path / "tensors", blanks(toy_tensors()), None),
        lambda: selection.newest_valid(path.parent, on_damaged=lambda path, why: pytest.fail(why), lacks=problems),
        lambda: selection.resolve_checkpoint(path, lacks=problems),
        lambda: consolidate(str(path), tmp_path / "out.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            look()
        assert str(path) in str(caught.value)
    save_toy(path.parent, 3)  # a new run at the same place is not held up by it
    assert len(list(path.parent.glob("damaged-step-00000003-*"))) == 1
