"""The page of a run: what it says of runs in every state, and what it costs a run."""

import base64
import hashlib
import json
import os
import re
import time

import pytest
from support.long_runs import write_long_run
from support.page_text import PageText

from stablelm.errors import ConfigError
from stablelm.observe.page.run_page import NAME, RunPage, make_page

HOSTILE = "{{7*7}}</style></title></pre><script>alert(1)</script><img src=//x onerror=alert(1)>\"'&\u202etxt"


@pytest.fixture
def run(tmp_path):
    """A finished run of 200 steps and 6 layers on two world sizes."""
    return write_long_run(tmp_path / "deep", steps=200, layers=6, layers_every=20, evaluate_every=50)


def page_of(run):
    make_page(run, run / NAME)
    return PageText((run / NAME).read_text(encoding="utf-8"))


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_it_says_what_the_run_is(run):
    page = page_of(run)
    for words in ("finished", "deepscalelm_pre · 6 layers × 1024 · 2.45G parameters · bf16", "128 processes",
                  "Validation loss, web", "Attempt 3 began", "on 128 processes instead of 64", "Token correlation",
                  "--config deep.yaml", "method: deepscalelm_pre"):  # fmt: skip
        assert words in page.text, words
    images = [given["href"] for tag, given in page.tags if tag == "image"]
    assert len(images) == 7 and all(uri.startswith("data:image/png;base64,") for uri in images)


def test_it_reaches_for_nothing_and_runs_nothing(run):
    text = (page_of(run), (run / NAME).read_text(encoding="utf-8"))[1]
    page = PageText(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, given in page.tags for name in given if name.startswith("on") or name in ("src", "style")]
    assert "://" not in text.replace("http-equiv", "") and "@import" not in text and "url(" not in text
    policy = next(given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_pictures_have_words(run):
    page = page_of(run)
    drawings = [given for _, given in page.tags if given.get("role") == "img"]
    assert len(drawings) >= 15 and all("aria-labelledby" in given for given in drawings)
    assert re.search(r"training: [\d.]+ at step 1, [\d.]+ at step 200; lowest", page.text)
    assert {"lang", "scope"} <= {name for _, given in page.tags for name in given}


@pytest.mark.parametrize("name", ["config", "summary", "provenance", "metrics", "samples", "folder"])
def test_what_a_file_holds_is_text(run, name):
    if name == "config":
        (run / "resolved.yaml").write_text(json.dumps({"model": {"method": HOSTILE, "n_layers": HOSTILE}}))
    elif name == "summary":
        change(run / "summary.json", exit_code=1, reason=HOSTILE)
    elif name == "provenance":
        entry = {"time": HOSTILE, "commit": HOSTILE, "hosts": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
        entry["argv"] = [HOSTILE]
        (run / "provenance.json").write_text(json.dumps([{"attempt": 3, "world_size": HOSTILE} | entry]))
    elif name == "folder":
        run = run.rename(run.with_name(HOSTILE.replace("/", "|")))
    else:
        named = {f"val_loss/{HOSTILE}": 1.0, f"mine/{HOSTILE}": 2.0, f"layer/0001/{HOSTILE}": 3.0}
        record = (
            named
            if name == "metrics"
            else {
                "samples": [{"prompt": HOSTILE, "text": HOSTILE}],
                "changes": {HOSTILE: [HOSTILE, HOSTILE]},
            }
        )
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 200, "tokens": 1, "attempt": 3} | record) + "\n")
    page = page_of(run)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [given for _, given in page.tags if "onerror" in given]
    assert "{{7*7}}<" in page.text and "<script>alert(1)" in page.text
    assert "\u202e" not in page.text


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (75, "time limit", ["stopped early", "Exit code 75: time limit", "Run the same command again"]),
        (75, "run.stop_after", ["Set a larger run.stop_after"]),
        (76, "a spike at step 7", ["diverged", "Exit code 76: a spike at step 7", "lower train.lr"]),
        (1, "KeyError: x", ["failed", "Exit code 1: KeyError: x"]),
    ],
)
def test_how_it_ended(run, code, reason, words):
    change(run / "summary.json", exit_code=code, reason=reason)
    text = page_of(run).text
    assert not [each for each in words if each not in text]


@pytest.mark.parametrize(("age", "words"), [(5, "running"), (4000, "No sign of life since")])
def test_a_run_without_a_summary_of_its_last_attempt(run, age, words):
    change(run / "summary.json", attempts=2)
    (run / "heartbeat").mkdir()
    (run / "heartbeat" / "rank-0.json").write_text(json.dumps({"written": time.time() - age}))
    assert words in page_of(run).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "resolved.yaml", "provenance.json", "summary.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "a directory", "a FIFO", "not Unicode"])
def test_a_page_says_what_is_missing(run, name, how):
    (run / name).unlink()
    if how == "a directory":
        (run / name).mkdir()
    elif how == "a FIFO":
        os.mkfifo(run / name)
    elif how != "missing":
        (run / name).write_bytes({"empty": b"", "garbage": b"{[}\n" * 9, "not Unicode": b"\xff\xfe\x00\n"}[how])
    text = page_of(run).text
    said = {
        "metrics.jsonl": "metrics.jsonl",
        "resolved.yaml": "resolved.yaml" if how != "empty" else "finished",
        "provenance.json": "provenance.json is missing or damaged",
        "summary.json": "summary.json cannot be read" if how != "missing" else "not finished",
    }
    assert said[name] in text, text[:1500]


def test_an_empty_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  n_layers: 3\n")
    assert "There are no records yet" in page_of(tmp_path).text


@pytest.mark.parametrize("make", ["missing", "file", "empty", "checkpoint"])
def test_what_is_no_run(tmp_path, make):
    path = tmp_path / "x"
    if make == "file":
        path.write_text("")
    elif make != "missing":
        path.mkdir()
    if make == "checkpoint":
        (path / "config.yaml").write_text("")
        (path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"{path} (is|does) .*name "):
        make_page(path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_aliases_that_multiply_are_not_followed(run):
    (run / "resolved.yaml").write_text(
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    )
    assert "resolved.yaml cannot be read" in page_of(run).text


def test_numbers_beyond_all_bounds(run):
    extreme = {"loss": 1e308, "grad_norm": -1e308, "lr": 5e-324, "val_loss/a": "inf", "mine": 2**63}
    extreme |= {f"layer/{n:04d}/x": value for n, value in enumerate((1e308, -1e308, "nan", 5e-324))}
    with open(run / "metrics.jsonl", "a") as file:
        for step in (201, 202, 2**62, 203):
            file.write(
                json.dumps({"step": step, "tokens": 2**62, "attempt": 3, "step_seconds": 1e308} | extreme) + "\n"
            )
    page_of(run)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_running_run_makes_it_as_seldom_as_it_must(run):
    clock, said = Clock(), []
    page = RunPage(run, enabled=True, message=said.append, clock=clock)
    page.refresh()
    assert not (run / NAME).exists()  # even a quick one would be more than 1 % of nothing
    clock.now = 1000.0
    page.refresh()
    assert "running" in PageText((run / NAME).read_text()).text
    (run / NAME).unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write((json.dumps({"step": 201, "attempt": 3, "text": "x" * 2_000_000}) + "\n") * 20)
    clock.now += 100.0
    page.refresh()
    assert not (run / NAME).exists()  # 40 MB would take more than 1 % of 100 s
    page.finish()
    assert "finished" in PageText((run / NAME).read_text()).text and said == []


@pytest.mark.parametrize("enabled", [False, True])
def test_it_never_stops_the_run(run, enabled):
    clock, said = Clock(), []
    page = RunPage(run, enabled=enabled, message=said.append, clock=clock)
    (run / NAME).mkdir()
    clock.now = 1000.0
    page.refresh()
    clock.now = 2000.0
    page.refresh()
    page.finish()
    assert len(said) == enabled and all("training continues" in words for words in said)
    assert not list(run.glob(".*"))


def test_a_link_in_its_place_is_replaced(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (run / NAME).symlink_to(tmp_path / "mine")
    page_of(run)
    assert (tmp_path / "mine").read_text() == "precious" and not (run / NAME).is_symlink()


@pytest.mark.slow
def test_a_long_and_deep_run(tmp_path):
    run = write_long_run(tmp_path / "run", steps=100_000, layers=192, layers_every=100, evaluate_every=2000)
    started = time.process_time()
    size = make_page(run, run / NAME)
    assert time.process_time() - started < 10
    assert size < 5e6
    PageText((run / NAME).read_text(encoding="utf-8"))
