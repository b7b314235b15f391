"""Text of others is shown without what would steer a terminal."""

import io

import pytest

from stablelm.errors import ConfigError
from stablelm.observe.console import Console
from stablelm.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\rb\x07\x00", "a\\rb\\x07\\x00"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("half \ud800", "half \\ud800"),
        ("tab\tand\nline, é 漢 🙂", "tab\tand\nline, é 漢 🙂"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str):
    assert printable(text) == shown
    assert str(ConfigError(text)) == shown
    stream = io.StringIO()
    Console(10, stream=stream).message(text)
    assert stream.getvalue() == shown + "\n"
