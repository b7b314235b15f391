"""The pages of docs/methods follow the code: methods, axes, rules, configurations, numbers and links."""

import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import pytest
from support.refusals import every_reason, refusals

from docs import make_method_figures
from stablelm.config.keys import choices
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS, apply_method
from stablelm.methods.catformer import CatformerOptions
from stablelm.methods.sizes import parameter_counts

PAGES = Path(__file__).resolve().parents[2] / "docs" / "methods"
FIGURES = PAGES / "figures"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
SNIPPETS = [
    pytest.param(snippet, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, snippet in enumerate(re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
]
LINKS = [
    pytest.param(name, link, id=f"{name}-{link}")
    for name, text in TEXTS.items()
    for link in dict.fromkeys(re.findall(r"\]\(([^)\s]+)\)", text))
    if "://" not in link
]
AXES = ("stream", "placement", "norm", "init", "reparam", "activation")
ATTENTION_AXES = ("position", "shaping", "gate", "softmax")
# Keeps the configuration that it was given, and draws a square.
PROBE = """
import shutil, sys
from pathlib import Path
from PIL import Image

flag, config, out, folder = sys.argv[1:]
assert (flag, out) == ("--config", "--out")
shutil.copy(config, "seen.yaml")
Image.new("RGB", (8, 8)).save(Path(folder) / "probe.png")
"""


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table below the first line that starts with `header`."""
    lines = text[text.index(header) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


INDEX = {row[0].split("`")[1]: row for row in rows(TEXTS["index.md"], "| method |")}


@lru_cache
def resolved(*overrides: str) -> Config:
    config = load([], ["train.steps=5", *overrides]).config
    return resolve(config, pieces=4096, world_size=1, accelerate_precision=None)


def body_parameters(method: str) -> int:
    """All but embeddings and head, of the shape that the index names."""
    shape = ("model.n_layers=48", "model.d_model=512", "model.n_heads=8")
    counts = parameter_counts(resolved(f"model.method={method}", *shape).model)
    return counts["total"] - counts["embedding"] - counts["head"]


def test_the_index_has_every_method_once_and_no_other():
    assert list(INDEX) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_the_index_says_what_the_catalogue_says(name):
    model = apply_method(ModelConfig(method=name))
    row = INDEX[name]
    assert row[2:6] == [model.stream, model.placement, model.init, model.reparam]
    assert int(row[6].replace(",", "")) == body_parameters(name) - body_parameters("pre_ln")
    if row[8]:
        surname, year = row[8].split()[0], row[8].split()[-1]
        page = TEXTS[row[0].partition("](")[2].partition(")")[0]]
        assert surname in page and year in page


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_figure_and_configuration_on_the_page_that_the_index_names(name):
    page = TEXTS[INDEX[name][0].partition("](")[2].rstrip(")").partition("#")[0]]
    assert f"![probe of {name}](figures/{name}.png)" in page
    assert re.search(rf"^ *method:.*\b{name}\b", page, re.MULTILINE)


def test_the_baseline_is_as_stated():
    assert f"{body_parameters('pre_ln'):,}" in TEXTS["index.md"]
    assert f"{body_parameters('pre_ln'):,}" in TEXTS["pre_ln.md"]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_configuration_loads_and_resolves(snippet, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(snippet, encoding="utf-8")
    config = load([str(file)], []).config
    model = resolve(config, pieces=4096, world_size=1, accelerate_precision=None).model
    assert all(getattr(model, f.name) is not None for f in fields(model))


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_relative_link_resolves(page, link):
    target, _, anchor = link.partition("#")
    if target.startswith("figures/") and not FIGURES.exists():
        pytest.skip("the figures are not drawn: python docs/make_method_figures.py")
    path = PAGES / (target or page)
    assert path.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("axis", [*AXES, *(f"attention.{axis}" for axis in ATTENTION_AXES)])
def test_the_axes_have_all_their_values(axis):
    values = set(choices(f"model.{axis}"))
    listed, key = set(), ""
    for row in rows(TEXTS["combining.md"], "| axis | key |"):
        key = row[1] or key
        if key == f"`model.{axis}`":
            listed.add(row[2].strip("`"))
    assert listed == values


def _reasons(example: str) -> set[str]:
    """Why the example is refused, as the error says."""
    keys = example.strip("`").split()
    with pytest.raises(ConfigError) as refused:
        resolved(*keys)
    model = apply_method(load([], keys).config.model)
    return {refusal.reason for refusal in refusals(model) if refusal.reason in str(refused.value)}


def test_every_reason_of_a_refusal_has_its_example():
    table = rows(TEXTS["combining.md"], "| example |")
    found = [_reasons(row[0]) for row in table]
    assert all(found)
    assert set().union(*found) == every_reason()
    assert len(table) == len(every_reason())


def test_the_numbers_of_catformers_shapes():
    table = rows(TEXTS["catformer.md"], "| layers x width")
    assert len(table) >= 4
    for shape, growth, d_attention, d_ff, width, error in table:
        n_layers, d_model, n_heads = map(int, re.findall(r"\d+", shape))
        sizes = (f"model.n_layers={n_layers}", f"model.d_model={d_model}", f"model.n_heads={n_heads}")
        config, twin = (
            resolved(f"model.method={method}", *sizes, "model.max_seq_len=512").model
            for method in ("catformer", "pre_ln")
        )
        options = config.option(CatformerOptions)
        found = (options.growth, options.d_attention, config.d_ff)
        assert found == (int(growth), int(d_attention), int(d_ff))
        assert int(width) == d_model + 2 * n_layers * int(growth)
        ours, theirs = (parameter_counts(model) for model in (config, twin))
        body = [counts["total"] - counts["embedding"] - counts["head"] for counts in (ours, theirs)]
        assert f"{100 * (body[0] / body[1] - 1):+.2f} %" == error


def test_a_figure_is_made_small(tmp_path):
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    make_method_figures.shrink(tmp_path / "large.png", tmp_path / "small.png", largest=8_000)
    assert (tmp_path / "small.png").stat().st_size < 8_000
    with Image.open(tmp_path / "small.png") as image:
        ratio = image.width / image.height
    assert ratio == pytest.approx(4 / 3, abs=0.05)


def test_a_figure_is_drawn_by_the_probe(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "probe.py").write_text(PROBE)
    monkeypatch.setattr(make_method_figures, "ROOT", tmp_path)
    monkeypatch.setattr(make_method_figures, "FIGURES", tmp_path / "figures")
    make_method_figures.draw("magneto")
    assert (tmp_path / "figures" / "magneto.png").stat().st_size > 0
    config = load([str(tmp_path / "seen.yaml")], []).config
    assert (config.model.method, config.model.n_layers, config.model.d_model) == ("magneto", 48, 128)
    assert config.data.path == "embedded"


def test_drawn_figures_are_small_and_complete():
    if not FIGURES.exists():
        pytest.skip("the figures are not drawn: python docs/make_method_figures.py")
    drawn = {path.stem: path.stat().st_size for path in FIGURES.glob("*.png")}
    assert set(drawn) == set(METHODS)
    assert max(drawn.values()) < 60_000


def test_the_page_on_adding_a_method_shows_the_file_that_is_tested():
    tested = (PAGES.parents[1] / "tests" / "methods" / "test_own_method.py").read_text(encoding="utf-8")
    pieces = re.findall(r"^```python\n(.*?)^```$", TEXTS["adding.md"], re.MULTILINE | re.DOTALL)
    assert len(pieces) == 4
    assert all(piece in tested for piece in pieces)
