"""Study files: what is read, and one sentence for each mistake, before anything is created."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.studies import STUDY, write_study
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.study.cells import Run, StudyTexts, cells_of
from stablelm.study.shapes import counted
from stablelm.study.study_file import read_study


def refusal(folder: Path, corpus: TinyCorpus, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cells_of(read_study(str(write_study(folder, corpus, **changes))))
    assert not (folder / "runs").exists() and not (folder / "results").exists()
    return str(caught.value)


GRID = STUDY["grid"]
SHAPES = {"rule": "equal_parameters", "parameters": 50_000}
MISTAKES = [
    ({"learning_rate": {}}, "unknown key learning_rate; the keys here are study, kind, base"),
    ({"seed": {"tune": [0]}}, "unknown key seed, did you mean seeds?"),
    ({"lr": {"strat": [1e-3]}}, "unknown key lr.strat, did you mean lr.start?"),
    ({"lr": {"start": [1e-3, 1e-3]}}, "lr.start=[0.001, 0.001] must be one or more numbers above 0, no two equal"),
    ({"lr": {"start": [1.0]}}, "lr.start: 1 lies outside lr.bounds=[1e-05, 0.3]"),
    ({"lr": {"max_runs": 2}}, "lr.max_runs=2 is less than the 3 rates of lr.start"),
    ({"lr": {"expand": 1}}, "lr.expand=1 must be above 1"),
    ({"lr": 3}, "lr must be a section, a mapping of keys"),
    ({"lr": {"start": "fast"}}, "lr.start=fast must be a list of numbers"),
    ({"seeds": {"tune": [0], "confirm": [0, 1]}}, "seeds: 0 is in tune and in confirm"),
    ({"stages": ["confirm"]}, "stages must begin with tune"),
    ({"stages": ["tune", "test"]}, "stages=[tune, test] must be a list of tune or confirm"),
    ({"budget": {}}, "budget must have one of tokens, tokens_per_parameter and flops, not 0"),
    ({"budget": {"tokens": 512, "flops": [1e9]}}, "one of tokens, tokens_per_parameter and flops, not 2"),
    ({"budget": {"tokens": 64}}, "the budget of 64 tokens is less than one step of 128; raise the budget"),
    ({"budget": {"tokens": 10**9}}, "a run reads 1,000,000,000 tokens of the text before it begins again"),
    ({"study": "a b"}, "study=a b must be letters, digits, -, _ and dots"),
    ({"study": None}, "study is missing; give it"),
    ({"base": None}, "base is missing; give it"),
    ({"base": "nowhere.yaml"}, "--config nowhere.yaml cannot be read"),
    ({"grid": GRID | {"depth": []}}, "grid.depth is empty"),
    ({"grid": GRID | {"depth": [2, 2]}}, "grid.depth has a value twice"),
    ({"grid": GRID | {"depth": [0]}}, "grid.depth: 0 must be an integer of at least 1"),
    ({"grid": GRID | {"warmup_fraction": [2]}}, "grid.warmup_fraction: 2 must be from 0 to 1"),
    ({"grid": GRID | {"train.lr": [1e-3]}}, "grid.train.lr is not for a grid: it follows from lr"),
    ({"grid": GRID | {"model.metod": ["a"]}}, "unknown key grid.model.metod, did you mean model.method?"),
    ({"grid": GRID | {"model.method": ["pre_lm"]}}, "pre_lm"),
    ({"grid": GRID | {"model.placement": ["post"], "model.stream": ["concat"]}}, "cell model.method=pre_ln"),
    ({"grid": {"model.method": ["pre_ln"]}}, "shapes.rule=fixed_width needs grid.depth, a list of depths"),
    ({"shapes": {"rule": "fixed_width"}}, "shapes.rule=fixed_width needs shapes.d_model"),
    ({"shapes": {"rule": "fixed_width", "d_model": 40}}, "width 40 is not two or more heads of shapes.d_head=16"),
    ({"shapes": {"rule": "list", "list": ["2x32"]}}, "shapes.rule=list names the depths; leave grid.depth out"),
    ({"shapes": {"rule": "list", "list": ["2-32"]}, "grid": {}}, "shapes.list: 2-32 must be LAYERSxWIDTH, as in 24x64"),
    ({"shapes": SHAPES | {"tolerance": 1e-6}}, "no width in steps of 16, from 32 up, has 50,000 parameters"),
    ({"shapes": {"rule": "equal_parameters"}}, "shapes.rule=equal_parameters needs shapes.parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES)
def test_a_mistake_is_a_sentence_with_its_place(
    tiny_corpus: TinyCorpus, tmp_path: Path, changes: dict[str, Any], sentence: str
):
    message = refusal(tmp_path, tiny_corpus, **changes)
    assert sentence in message
    assert "Traceback" not in message and (str(tmp_path) in message or "nowhere" in message)


def test_every_illegal_cell_is_named(tiny_corpus: TinyCorpus, tmp_path: Path):
    message = refusal(tmp_path, tiny_corpus, grid=GRID | {"model.method": ["deepscalelm_pre", "pre_ln"]})
    assert message.count("\n") == 0 and "cell model.method=deepscalelm_pre depth=2" in message


def test_a_base_without_a_key_that_is_needed(tiny_corpus: TinyCorpus, tmp_path: Path):
    file = write_study(tmp_path, tiny_corpus)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    del base["data"]["validation"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(ConfigError, match=r"data\.validation is missing, .* give it in the base"):
        cells_of(read_study(str(file)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- a", "must be a mapping of keys"),
        (b"study: [", "not valid YAML"),
        (b"study: a\nstudy: b", "study is given twice"),
        (b"\xff", "not UTF-8"),
        (b"", "must be a mapping of keys"),
    ],
)
def test_files_that_are_no_study(tmp_path: Path, content: bytes, sentence: str):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_study(str(tmp_path / "study.yaml"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_study(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("methods", "parameters", "depths"),
    [(["pre_ln", "magneto", "value_residual"], 300_000, [3, 6, 12]), (["catformer", "mlra"], 3_000_000, [3, 12])],
)
def test_equal_parameters_and_trimmed_feedforwards(
    tiny_corpus: TinyCorpus, tmp_path: Path, methods: list[str], parameters: int, depths: list[int]
):
    study = read_study(str(write_study(
        tmp_path, tiny_corpus, grid={"model.method": methods, "depth": depths},
        shapes={"rule": "equal_parameters", "parameters": parameters, "d_head": 8, "multiple": 16},
    )))  # fmt: skip
    cells = cells_of(study)
    assert len(cells) == len(methods) * len(depths)
    for cell in cells:
        assert counted(study, cell.config.model) == pytest.approx(parameters, rel=0.01), cell.name
        assert cell.shape.d_model % 16 == 0 and cell.shape.n_heads == cell.shape.d_model // 8 >= 2
    assert any(cell.shape.d_ff != 4 * cell.shape.d_model for cell in cells)


def test_a_list_of_shapes_and_budgets_by_parameter(tiny_corpus: TinyCorpus, tmp_path: Path):
    study = read_study(str(write_study(
        tmp_path, tiny_corpus, grid={"model.method": ["pre_ln"]}, shapes={"rule": "list", "list": ["2x32", "3x48"]},
        budget={"tokens_per_parameter": [0.02, 0.05]},
    )))  # fmt: skip
    cells = cells_of(study)
    assert [(str(cell.shape), dict(cell.point)["tokens_per_parameter"]) for cell in cells] == [
        ("2x32", 0.02), ("2x32", 0.05), ("3x48", 0.02), ("3x48", 0.05),
    ]  # fmt: skip
    for cell in cells:
        wanted = cell.counts["layers"] * dict(cell.point)["tokens_per_parameter"]
        assert abs(cell.tokens - wanted) <= 64
        assert cell.config.train.warmup_steps == round(0.05 * (cell.config.train.steps or 0))


def test_identities(tiny_corpus: TinyCorpus, tmp_path: Path):
    study = read_study(str(write_study(tmp_path, tiny_corpus)))
    cells, again = cells_of(study, StudyTexts()), cells_of(study)
    runs = [Run(cell, lr, seed) for cell in cells for lr in (1e-3, 2e-3) for seed in (0, 1)]
    assert len({run.id for run in runs}) == len(runs)
    assert [run.id for run in runs[:4]] == [Run(again[0], lr, seed).id for lr in (1e-3, 2e-3) for seed in (0, 1)]
    free = read_study(str(write_study(tmp_path, tiny_corpus, grid=GRID | {"engine.recompute": ["none", "full"]})))
    found = cells_of(free)
    assert len(found) == 8 and len({Run(cell, 1e-3, 0).id for cell in found}) == 4
