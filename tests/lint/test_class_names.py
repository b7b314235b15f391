"""The check finds classes of one name, and the package has none."""

from lint.class_names import classes, main, repeated


def test_it_finds_them(tmp_path):
    (tmp_path / "a.py").write_text("class Line: ...\n\nclass Point:\n    class Inner: ...\n")
    (tmp_path / "b.py").write_text("def f():\n    class Line: ...\n")
    (problem,) = repeated(classes(tmp_path.glob("*.py")))
    assert "a.py:1" in problem and "b.py:2" in problem and problem.endswith("Line")


def test_the_package_has_none(capsys):
    assert main() == 0, capsys.readouterr().out
