"""The page of all keys follows the schema."""

from pathlib import Path

from docs.make_config_reference import ROOT, render
from stablelm.config.keys import keys


def test_the_page_is_up_to_date():
    page = Path(ROOT) / "docs" / "configuration.md"
    assert page.read_text() == render(), "run: python docs/make_config_reference.py"


def test_every_key_has_its_row():
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows if row.count("|") - row.count("\\|") == 7] == list(keys())
    assert all(key.text for key in keys().values())
