"""Plain lines in a log, a bar on a terminal."""

import io
import math
import time

import pytest

from stablelm.observe.console import Console, short_number, short_time, training_words

RECORD = {
    "step": 120,
    "loss": 5.12341,
    "lr": 3e-4,
    "grad_norm": 0.812,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.5,
    "data_wait_seconds": 0.002,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_of_a_record():
    assert training_words(RECORD, 400, 130.2) == (
        "step 120/400  loss 5.1234  lr 3.0e-04  grad_norm 0.81  12.3k tokens/s  data 0.4%  remaining 2m10s"
    )


def test_a_record_with_the_loss_alone():
    assert training_words({"step": 1, "loss": math.nan}, 9, None) == "step 1/9  loss nan"


def test_a_log_gets_one_line_a_record(monkeypatch):
    log, started = io.StringIO(), time.monotonic()
    console = Console(total_steps=400, first_step=100, stream=log)
    monkeypatch.setattr("stablelm.observe.console.time.monotonic", lambda: started + 20)
    console.write(RECORD)
    console.write({"step": 120, "val_loss/default": 5.5, "val_loss/c4": 6.25, "val_bits_per_byte/c4": 1.0})
    console.write({"step": 121, "layer/0000/stream_rms": 1.0})
    console.message("saved")
    console.close()
    lines = log.getvalue().split("\n")
    assert lines[0].startswith("step 120/400  loss 5.1234")
    assert lines[0].endswith("remaining 4m40s")
    assert lines[1:] == ["step 120/400  val_loss/default 5.5000  val_loss/c4 6.2500", "saved", ""]


def test_no_time_left_before_the_first_step():
    log = io.StringIO()
    Console(total_steps=400, first_step=120, stream=log).write(RECORD)
    assert "remaining" not in log.getvalue()


def test_a_terminal_gets_a_bar_and_whole_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    screen = Terminal()
    console = Console(total_steps=400, stream=screen)
    message = "a [bold]path[/bold] " + "x" * 200
    console.message(message)
    console.write(RECORD)
    console.write({"step": 120, "val_loss/default": 5.5})
    console.close()
    shown = screen.getvalue()
    assert message in shown
    assert "val_loss/default 5.5000" in shown
    assert "120/400" in shown
    assert "loss 5.1234" in shown
    assert "12.3k tokens/s" in shown
    assert "remaining" in shown
    assert "grad_norm" not in shown


def test_the_cursor_stays_when_nobody_closes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    console = Console(total_steps=400, stream=screen)
    shown = screen.getvalue()
    console.close()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.4, "0"), (950, "950"), (999.6, "1.00k"), (12345, "12.3k"), (123456, "123k"), (2.5e6, "2.50M"), (3e9, "3.00G")],
)
def test_numbers(value, words):
    assert short_number(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (130, "2m10s"), (3599.9, "1h00m"),
        (11100, "3h05m"), (187200, "2d04h"), (math.inf, "?"), (math.nan, "?"),
    ],
)  # fmt: skip
def test_times(seconds, words):
    assert short_time(seconds) == words
