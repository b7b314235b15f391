"""Damaged small files of a run, its checkpoints and prepared shards: a function of a seed.

Each file is one that a program reads back: JSON in which a value, a name or the text itself is replaced. Where a hash
seals a file, some damages are sealed again, as by somebody who means harm.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.programs import LAUNCH
from support.samples import REPOSITORY

from stablelm.checkpoint import manifest
from stablelm.checkpoint.manifest import record_of
from stablelm.data.shards import shard_format

RAW = [
    *(
        "[1]",
        "{}",
        "[]",
        '""',
        "null",
        "true",
        "-1",
        "0.5",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "1e308",
        "0",
        "1",
        "3",
        "7",
    ),
    *(str(2**63), str(2**62), "9" * 400, "9" * 5000, "[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500),
    *(json.dumps("\x1b[31m\u202e\r"), json.dumps("../../../etc/passwd"), json.dumps("x" * 300_000), '"\\ud800"'),
    *(json.dumps("/dev/zero"), '{"a": 1, "a": 2}', "[[[1, 2], 3], {}]", '{"0": [1]}', '"3"', "tru", '"'),
]
"""What takes the place of a value in the text of a JSON file."""
WHOLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, draw: b"",
    "cut short": lambda data, draw: data[: draw.randrange(len(data))],
    "a flipped bit": lambda data, draw: _flipped(data, draw),
    "not UTF-8": lambda data, draw: b"\xff\xfe" + data,
    "a byte order mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "zeros": lambda data, draw: bytes(len(data)),
    "zeros within": lambda data, draw: data[: len(data) // 2] + bytes(64) + data[len(data) // 2 :],
    "twice": lambda data, draw: data + data,
    "noise": lambda data, draw: draw.randbytes(200),
    "10 MB": lambda data, draw: b'["' + b"x" * 10_000_000 + b'"]',
}
LINES = ("metrics.jsonl", "slurm/attempts.jsonl")
STEP = "checkpoints/step-00000002"


@dataclass(frozen=True)
class Input:
    """A damaged copy of what a run left: `folder` holds it, `file` is the one that was damaged, `line` reads it."""

    folder: Path
    file: str
    what: str
    line: tuple[str, ...]


def inputs(healthy: Path, folder: Path, *, seed: int, count: int, resume: list[str]) -> list[Input]:
    """`count` damaged copies of `healthy`, which holds `run` and `prepared`, in folders below `folder`.

    `resume`: arguments of pretrain that go on with the run, but for its paths.
    """
    draw, made = random.Random(seed), []
    files = [*RUN_FILES, *STEP_FILES, *SHARD_FILES]
    for number in range(count):
        file = files[number % len(files)]
        copy = folder / f"{number:04d}"
        shutil.copytree(healthy, copy)
        what = _damage(copy, file, draw)
        made.append(Input(copy, file, what, _reader(file, copy, resume, draw)))
    return made


RUN_FILES = [
    *("run/summary.json", "run/identity.json", "run/provenance.json", "run/data_files.json", "run/metrics.jsonl"),
    *("run/attempts/00000001.json", "run/slurm/attempts.jsonl"),
]
STEP_FILES = [
    *(f"run/{STEP}/COMMITTED", f"run/{STEP}/manifest.json", f"run/{STEP}/state.json"),
    "run/checkpoints/fence/00000001",
]
SHARD_FILES = ["prepared/manifest.json", "prepared/footer", "prepared/tokens"]


def _reader(file: str, copy: Path, resume: list[str], draw: random.Random) -> tuple[str, ...]:
    """A program, by the path of its script, and arguments that make it read the file."""
    run_dir, pretrain = str(copy / "run"), str(LAUNCH / "pretrain.py")
    if file.startswith("prepared"):
        shards = [f"data.path={copy / 'prepared'}", "data.source=shards", f"run.dir={copy / 'new'}"]
        return (pretrain, *resume, *shards, "train.steps=1")
    goes_on = (pretrain, *resume, f"run.dir={run_dir}")
    if file in STEP_FILES:
        script = str(LAUNCH / "checkpoints.py")
        evaluates = (str(LAUNCH / "eval.py"), "--checkpoint", run_dir, "--sequences", "2")
        return draw.choice([goes_on, goes_on, (script, "verify", run_dir), (script, "list", run_dir), evaluates])
    if file.endswith(("identity.json", "data_files.json", "metrics.jsonl")):
        return goes_on
    attempt = str(REPOSITORY / "slurm" / "attempt.py")
    asks = [(attempt, command, run_dir) for command in ("state", "begin", "tell", "unevaluated")]
    return draw.choice([goes_on, *asks, (attempt, "end", run_dir, "--rc", "1")])


def _damage(copy: Path, file: str, draw: random.Random) -> str:
    if file in ("prepared/footer", "prepared/tokens"):
        return _damage_shard(next((copy / "prepared").glob("*.tokens")), file == "prepared/footer", draw)
    path = copy / file
    data = path.read_bytes()
    if not file.endswith(LINES) and draw.random() < 0.1:
        path.unlink()
        return _put_in_place(path, draw.choice(["a FIFO", "an endless device", "a directory", "a dangling link"]))
    changed, what = _changed(data, draw, lines=file.endswith(LINES))
    path.write_bytes(changed)
    if file in STEP_FILES[:3] and draw.random() < 0.7:
        what += ", sealed again"
        seal(path, changed)
    return what


def _put_in_place(path: Path, what: str) -> str:
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "an endless device" else "nothing")
    return what


def _changed(data: bytes, draw: random.Random, *, lines: bool) -> tuple[bytes, str]:
    """Damaged content, and how. `lines`: of JSON on lines, one is damaged."""
    if draw.random() < 0.25:
        what = draw.choice(list(WHOLE))
        return WHOLE[what](data, draw), what
    if lines:
        rows = data.splitlines(keepends=True)
        number = draw.randrange(len(rows))
        changed, what = _changed_json(rows[number].strip(), draw)
        return b"".join([*rows[:number], changed + b"\n", *rows[number + 1 :]]), f"line {number + 1}: {what}"
    return _changed_json(data, draw)


def _changed_json(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    value = json.loads(data)
    places = list(_places(value, ()))
    place = draw.choice(places)
    mark, raw = "@@", draw.choice(RAW)
    how = draw.choice(["value", "value", "value", "removed", "named twice"])
    if how == "removed" and place:
        return _text(_without(value, place)), f"{place} removed"
    if how == "named twice" and place and isinstance(place[-1], str):
        name = json.dumps(place[-1]).encode()
        return data.replace(name + b":", name + b": 0, " + name + b":", 1), f"{place} named twice"
    text = _text(_with(value, place, mark)).replace(json.dumps(mark).encode(), raw.encode())
    return text, f"{place} is {raw[:30]}"


def _places(value: Any, place: tuple) -> Any:
    yield place
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*place, name))


def _with(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    changed = value.copy()
    changed[place[0]] = _with(value[place[0]], place[1:], new)
    return changed


def _without(value: Any, place: tuple) -> Any:
    changed = value.copy()
    if len(place) == 1:
        del changed[place[0]]
    else:
        changed[place[0]] = _without(value[place[0]], place[1:])
    return changed


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def seal(path: Path, content: bytes) -> None:
    """Makes the hashes of a step fit what a file of it holds now."""
    step = path.parent
    if path.name == "COMMITTED":
        fields = manifest.Commit.__annotations__
        try:
            found = json.loads(content)
            sealed = manifest.commit_content(manifest.Commit(**{name: found[name] for name in fields}))
        except (ValueError, KeyError, TypeError, RecursionError):  # nothing that could be sealed
            return
        path.write_bytes(sealed)
        return
    commit = manifest.read_commit(step)
    if path.name == "state.json":
        records = manifest.read_manifest(step, commit) | {"state.json": record_of(content)}
        content = manifest.manifest_content(records)
        (step / "manifest.json").write_bytes(content)
    fields = {**vars(commit), "manifest_sha256": hashlib.sha256(content).hexdigest()}
    (step / "COMMITTED").write_bytes(manifest.commit_content(manifest.Commit(**fields)))


def _damage_shard(path: Path, footer: bool, draw: random.Random) -> str:
    data = path.read_bytes()
    length, _ = shard_format.TAIL.unpack(data[-shard_format.TAIL.size :])
    start = len(data) - shard_format.TAIL.size - length
    if not footer:
        position = draw.randrange(start)
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << draw.randrange(8)]) + data[position + 1 :])
        return f"a flipped bit in byte {position}"
    words, what = _changed(data[start : -shard_format.TAIL.size], draw, lines=False)
    path.write_bytes(data[:start] + words + shard_format.TAIL.pack(len(words), shard_format.MAGIC))
    return what
