"""Runs and checkpoints as somebody else may have made them: whole ones, and what is done to them.

A harm changes a run directory in place, with manifest and COMMITTED made to fit where an attacker would. `outside` is a
folder of the victim's that nothing may change; what lies there is named by the harms.
"""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from support.tiny import TinyCorpus

from stablelm.checkpoint import commit, manifest
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.manifest import record_of_file
from stablelm.config import rules
from stablelm.config.identity import identity
from stablelm.config.load import dump, load
from stablelm.tokenizers import load_tokenizer

SMALL = (
    "model.n_layers=1", "model.d_model=16", "model.n_heads=2", "data.seq_len=16", "data.lanes=4",
    "train.steps=2", "train.global_batch_size=4", "evaluate.batches=1",
)  # fmt: skip
STEPS = (1, 2)


def make_run(folder: Path, corpus: TinyCorpus, *overrides: str) -> Path:
    """A run of a tiny untrained model with two checkpoints, as training leaves it; `overrides` change its keys."""
    run = folder / "run"
    loaded = load([], [*SMALL, *corpus.overrides(), f"run.dir={run}", *overrides])
    tokenizer = load_tokenizer(corpus.tokenizer)
    config = rules.resolve(
        loaded.config, pieces=tokenizer.pieces, eos=tokenizer.eos, world_size=1, accelerate_precision=None
    )  # fmt: skip
    what = identity(config, base_names=["tiny.json.gz"], tokenizer_sha256=tokenizer.sha256)
    draw = torch.Generator().manual_seed(0)
    shapes = expected_shapes(config.model)
    tensors = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    for step in STEPS:
        state = {"step": step, "tokens": 64 * step, "data": {"data_step": step, "lanes": {}}, "identity": what}
        commit.save(
            Fence(run / "checkpoints", 1, "1"), step, tensors, state, dump(loaded.asked), shapes=shapes, group=None
        )  # fmt: skip
    (run / "config.yaml").write_text(dump(loaded.asked))
    (run / "identity.json").write_text(json.dumps(what))
    (run / "metrics.jsonl").write_text('{"step": 2, "tokens": 128, "attempt": 1, "loss": 5.0}\n')
    shutil.copyfile(corpus.tokenizer, run / "tokenizer.model")
    return run


def steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def reseal(step: Path) -> None:
    """Makes manifest and COMMITTED fit what stands in the directory, as whoever made it would."""
    told = json.loads((step / "COMMITTED").read_text())
    names = manifest.files_below(step) - {"manifest.json", "COMMITTED"}
    records = {name: record_of_file(step / name) for name in names if (step / name).is_file()}
    content = manifest.manifest_content(records)
    (step / "manifest.json").write_bytes(content)
    sealed = manifest.record_of(content).sha256
    made = manifest.Commit(told["step"], told["attempt"], told["token"], told["time"], sealed)
    (step / "COMMITTED").write_bytes(manifest.commit_content(made))


def set_keys(run: Path, **keys: Any) -> None:
    """Sets keys, written as section__key, in the configuration of the run and of its checkpoints."""
    for folder in [run, *steps(run)]:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        for name, value in keys.items():
            *sections, last = name.split("__")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        if folder != run:
            reseal(folder)


@dataclass(frozen=True)
class Harm:
    """`do(run, outside, draw)` changes a run directory; `refused`: the only right end is a refusal."""

    name: str
    do: Callable[[Path, Path, random.Random], None]
    refused: bool = False


def _keys(name: str, refused: bool = True, **keys: Any) -> Harm:
    """A harm of the configuration; `{outside}` and `{run}` in a value are these folders."""

    def do(run: Path, outside: Path, draw: random.Random) -> None:
        def filled(value: Any) -> Any:
            words = isinstance(value, str)
            return value.replace("{outside}", str(outside)).replace("{run}", str(run)) if words else value

        (run / "row.json").write_text(COMMAND)
        set_keys(run, **{key: filled(value) for key, value in keys.items()})

    return Harm(name, do, refused)


COMMAND = '{"touch": 1, "made-by-a-function": 2, "text": "a document"}\n'
"""A row whose keys are a command line to whatever takes the words of one."""
FOREIGN = [
    _keys("filter-runs-a-command", data__filter="subprocess:run", data__validation_path="{run}/row.json"),
    _keys("map-runs-a-command", data__map="subprocess:check_output", data__validation_path="{run}/row.json"),
    _keys("filter-removes-a-tree", data__filter="shutil:rmtree"),
    _keys("map-evaluates", data__map="builtins:eval"),
    _keys("map-of-a-module-beside", data__map="sitecustomize:main"),
    _keys("method-by-import-path", model__method="os:system"),
    _keys("method-of-a-module-beside", model__method="sitecustomize:METHOD", model__method_options={"a": 1}),
    _keys("method-with-control-characters", model__method="os\x1b[2J:system"),
    _keys("options-of-no-method", model__method_options={"a": "b"}),
    _keys("an-unknown-axis-value", model__stream="os:system"),
    _keys("web-text", data__validation_path="http://127.0.0.1:9/a.json.gz"),
    _keys("object-store", data__validation_path="s3://bucket/a.json.gz", data__storage={"s3": {"anon": True}}),
    _keys("hub-text", data__validation_path="hf://datasets/a/b/c.json.gz"),
    _keys("data-set", data__source="datasets", data__validation_path="somebody/code"),
    _keys("chained-url", data__validation_path="zip://a.json::http://127.0.0.1:9/a.zip"),
    _keys("memory-store", data__validation={"a": "memory://a.json"}),
    _keys("fifo-as-text", data__validation_path="{outside}/fifo"),
    _keys("endless-device-as-text", data__validation_path="/dev/zero"),
    _keys("searches-the-disk", data__validation_path="/**/*.json"),
    _keys("searches-wide", data__validation_path="/*/*/*/*/*.json"),
    _keys("braces-without-end", data__validation_path="/a{0..999999999}.json"),
    _keys("cache-elsewhere", refused=False, data__cache="{outside}/made"),
    _keys("cache-in-a-file", refused=False, data__cache="{outside}/kept.txt"),
    _keys("tokenizer-elsewhere", refused=False, data__tokenizer="{outside}/fifo"),
    _keys("tokenizer-on-the-hub", refused=False, data__tokenizer="somebody/model"),
    _keys("tokenizer-at-a-hub-address", refused=False, data__tokenizer="hf://somebody/model"),
    _keys("tokenizer-on-the-web", refused=False, data__tokenizer="http://127.0.0.1:9/a.model"),
    _keys("checkpoints-elsewhere", refused=False, checkpoint__dir="{outside}/other/checkpoints", checkpoint__keep=1),
    _keys("checkpoints-in-a-store", refused=False, checkpoint__dir="s3://bucket/run"),
    _keys("run-elsewhere", refused=False, run__dir="{outside}"),
    _keys("layers-without-end", model__n_layers=10**9),
    _keys("width-without-end", model__d_model=2**40),
    _keys("words-without-end", model__vocab_size=2**45),
    _keys("sequence-without-end", refused=False, data__seq_len=2**40, model__max_seq_len=2**40),
    _keys("no-heads", model__n_heads=0),
    _keys("less-than-no-layers", model__n_layers=-1),
    _keys("batches-without-end", refused=False, evaluate__batches=2**40, evaluate__micro_batch_size=2**40),
    _keys("a-number-for-a-section", model=3),
    _keys("words-for-a-number", model__d_model="x" * 10_000),
    _keys("control-characters", data__validation_path="http://\x1b[2J\x1b]0;a\x07/a.json.gz"),
]


def _config_text(name: str, text: bytes) -> Harm:
    def do(run: Path, outside: Path, draw: random.Random) -> None:
        for folder in [run, *steps(run)]:
            (folder / "config.yaml").write_bytes(text)
            if folder != run:
                reseal(folder)

    return Harm(name, do, refused=True)


_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
TEXTS = [
    _config_text("aliases-of-aliases", _BOMB.encode()),
    _config_text("nested-without-end", b"a: " + b"[" * 100_000),
    _config_text("contains-itself", b"model: &a\n  b: *a\n"),
    _config_text("yaml-tag", b"model: !!python/object/apply:os.system ['touch made']\n"),
    _config_text("not-utf-8", b"\xff\xfe\x00m"),
    _config_text("no-yaml", b"\x00\x01\x02"),
    _config_text("a-list", b"- a\n"),
    _config_text("long", b"a: " + b"x" * (8 << 20)),
]


class _Runs:
    """What a pickle makes run."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch made-by-a-pickle",)


def _replace(name: str, file: str, make: Callable[[Path, Path], None]) -> Harm:
    """Puts something else where a file of the newest step stood; `make(path, outside)`."""

    def do(run: Path, outside: Path, draw: random.Random) -> None:
        path = steps(run)[-1] / file
        path.unlink()
        make(path, outside)

    return Harm(f"{file.replace('/', '-')}-{name}", do)


def _sealed(name: str, file: str, content: bytes, refused: bool = True) -> Harm:
    def do(run: Path, outside: Path, draw: random.Random) -> None:
        for step in steps(run):
            (step / file).write_bytes(content)
            reseal(step)

    return Harm(name, do, refused)


def _earlier_format(run: Path, outside: Path, draw: random.Random) -> None:
    for step in steps(run):
        (step / "tensors" / "index.json").unlink()
        (step / "tensors" / ".metadata").write_bytes(pickle.dumps(_Runs()))
        reseal(step)


_THINGS: dict[str, Callable[[Path, Path], None]] = {
    "fifo": lambda path, outside: os.mkfifo(path),
    "folder": lambda path, outside: path.mkdir(),
    "endless": lambda path, outside: path.symlink_to("/dev/zero"),
    "link": lambda path, outside: path.symlink_to(outside / "kept.txt"),
    "dangling": lambda path, outside: path.symlink_to(outside / "nothing"),
    "loop": lambda path, outside: path.symlink_to(path.name),
    "empty": lambda path, outside: path.touch(),
}
FILES = ("COMMITTED", "manifest.json", "config.yaml", "state.json", "tensors/index.json")
PLANTED = [_replace(name, file, make) for file in FILES for name, make in _THINGS.items()]
PLANTED += [
    _sealed("pickle-for-the-index", "tensors/index.json", pickle.dumps(_Runs())),
    _sealed("pickle-for-the-state", "state.json", pickle.dumps(_Runs())),
    _sealed("pickle-beside-the-index", "tensors/.metadata", pickle.dumps(_Runs()), refused=False),
    Harm("pickle-of-the-earlier-format", _earlier_format, refused=True),
    _sealed("state-is-a-list", "state.json", b"[1]"),
    _sealed("identity-is-a-list", "state.json", b'{"step": 2, "tokens": 1, "identity": [1], "data": {}}'),
    _sealed("identity-of-wrong-types", "state.json", json.dumps(
        {"step": 2, "tokens": 1, "data": {}, "identity": {"model.vocab_size": "many", "model.d_ff": [1], "x": 1}}
    ).encode()),
]  # fmt: skip


def identity_without(key: str) -> Harm:
    """A key is missing from the identity in every step's state."""

    def do(run: Path, outside: Path, draw: random.Random) -> None:
        for step in steps(run):
            state = json.loads((step / "state.json").read_text())
            del state["identity"][key]
            (step / "state.json").write_text(json.dumps(state))
            reseal(step)

    return Harm(f"identity-without-{key}", do)


def _step_is_a_link(run: Path, outside: Path, draw: random.Random) -> None:
    step = steps(run)[0]
    shutil.rmtree(step)
    step.symlink_to(outside / "other" / "checkpoints" / step.name)


def _checkpoints_is_a_link(run: Path, outside: Path, draw: random.Random) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(outside / "other" / "checkpoints")


def _left_over_links(run: Path, outside: Path, draw: random.Random) -> None:
    for name in (".staging-00000000-00000003-x", ".deleting-x", "fence/x"):
        (run / "checkpoints" / "fence").mkdir(exist_ok=True)
        (run / "checkpoints" / name).symlink_to(outside / "other" / "checkpoints")


def _kept_tokenizer(make: Callable[[Path, Path], None]) -> Callable[[Path, Path, random.Random], None]:
    def do(run: Path, outside: Path, draw: random.Random) -> None:
        (run / "tokenizer.model").unlink()
        make(run / "tokenizer.model", outside)

    return do


LINKS = [
    *(Harm(f"kept-tokenizer-{name}", _kept_tokenizer(make)) for name, make in _THINGS.items()),
    Harm("a-step-is-a-link", _step_is_a_link),
    Harm("checkpoints-is-a-link", _checkpoints_is_a_link),
    Harm("left-over-links", _left_over_links),
]


def _damage(run: Path, outside: Path, draw: random.Random) -> None:
    """Flips bits of a file, or cuts it, or doubles it; half of the time so that manifest and COMMITTED fit."""
    step = draw.choice(steps(run))
    path = step / draw.choice(sorted(manifest.files_below(step)))
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "double", "zeros"])
    if kind == "flip" and content:
        for _ in range(draw.choice([1, 3, 50])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content) + 1) :]
    elif kind == "double":
        content = content * 2
    else:
        content[:] = bytes(len(content))
    path.write_bytes(content)
    if path.name not in ("manifest.json", "COMMITTED") and draw.random() < 0.5:
        reseal(step)


def random_damage(seed: int) -> Harm:
    return Harm(f"damage-{seed}", lambda run, outside, draw: _damage(run, outside, random.Random(seed)))


HARMS = {harm.name: harm for harm in [*FOREIGN, *TEXTS, *PLANTED, *LINKS]}
