"""The check of axis names finds what decides by a name, and nothing in the repository does."""

import pytest
from lint.axis_names import classes, findings, main, own_files

NAMES = {"concat", "sigma", "swiglu"}


@pytest.mark.parametrize(
    "source",
    [
        'if model.stream == "concat": pass',
        'if "sigma" != model.reparam: pass',
        'if model.activation in ("relu", "swiglu"): pass',
        'match model.stream:\n    case "concat": pass',
        'TABLE = {"swiglu": 3}',
        "isinstance(stream, Concat)",
        "isinstance(stream, (Residual, catformer.Concat))",
    ],
)
def test_a_decision_by_a_name_is_found(source: str):
    assert [line for line, _ in findings(source, NAMES, {"Concat"})]


@pytest.mark.parametrize(
    "source",
    ['replace(model, stream="concat")', 'DEFAULTS = {"stream": "concat"}', '"""swiglu == gelu"""', "x == concat"],
)
def test_a_name_that_decides_nothing_is_left(source: str):
    assert not list(findings(source, NAMES, {"Concat"}))


def test_the_names_and_classes_are_those_of_the_axes():
    owners = own_files()
    assert {path.name for path in owners["concat"]} == {"catformer.py"}
    assert {path.name for path in owners["completep"]} == {"completep.py"}  # of two axes
    assert {path.name for path in owners["peri"]} == {"peri_ln.py"}
    assert {"Concat", "Placement", "Stream"} <= classes()


def test_nothing_decides_by_a_name(capsys: pytest.CaptureFixture[str]):
    assert main() == 0, capsys.readouterr().out
