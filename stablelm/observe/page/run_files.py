"""What a run directory says of its run besides the records: files that anybody may have put there, read with bounds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stablelm.config import text
from stablelm.errors import ConfigError
from stablelm.json_text import parse
from stablelm.observe import provenance
from stablelm.small_files import read_small

METRICS, SUMMARY, ATTEMPTS = "metrics.jsonl", "summary.json", "provenance.json"
CONFIGS = ("resolved.yaml", "config.yaml")
MOST_BYTES = 4 << 20
SILENT_SECONDS = 180.0
"""A run writes its heartbeat every ten seconds; after so long without one it is not taken for running."""

_CODES = {
    0: ("finished", "good", ""),
    74: ("storage failed", "bad", "Free some space or make the directory writable, then run the same command again."),
    75: ("stopped early", "wait", "Run the same command again: it resumes from the newest checkpoint."),
    76: ("diverged", "bad", "Start again with a lower train.lr or a more stable model.method."),
    77: ("text unavailable", "bad", "Once the text can be read, run the same command again: it resumes."),
    78: ("bad configuration", "bad", ""),
    79: ("no progress", "bad", "Three attempts in a row ended without a new checkpoint."),
    80: ("a rank was lost", "bad", "Run the same command again: it resumes. stacks/ has the stacks of all ranks."),
}


@dataclass(frozen=True)
class RunState:
    """How a run is doing: a word, how good it is (good, wait, bad or live), details, and what to do."""

    word: str
    tone: str
    words: str = ""
    hint: str = ""


@dataclass
class RunFiles:
    """`config` is nested as in the file; `problems`: a sentence for each file that is missing or damaged."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config_name: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    heartbeat: float | None = None
    """When rank 0 last wrote, in seconds since 1970."""
    problems: list[str] = field(default_factory=list)

    def key(self, name: str) -> Any:
        """The value of a dotted key, None where the configuration lacks it."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def figure(self, name: str) -> float | None:
        """A number of the summary."""
        return number(self.summary.get(name))

    def state(self, last_attempt: int, *, running: bool) -> RunState:
        """`last_attempt`: the largest number in the records; `running`: whether the run itself asks."""
        begun = max([last_attempt, *(entry["attempt"] for entry in self.attempts)])
        code = self.summary.get("exit_code")
        if isinstance(code, int) and (number(self.summary.get("attempts")) or 0) >= begun and not running:
            reason = str(self.summary.get("reason", ""))
            word, tone, hint = _CODES.get(code, ("failed", "bad", ""))
            if code == 75 and reason == "run.stop_after":
                hint = "Set a larger run.stop_after, or none, and run the same command again."
            words = f"Exit code {code}" + (f": {reason}" if reason not in ("", word) else "") if code else ""
            return RunState(word, tone, words, hint)
        if running or (self.heartbeat is not None and time.time() - self.heartbeat < SILENT_SECONDS):
            return RunState("running", "live")
        since = f"No sign of life since {moment(self.heartbeat)}." if self.heartbeat else "There is no heartbeat."
        return RunState("not finished", "wait", since, "If it was killed, run the same command again: it resumes.")


def read_run(run_dir: Path) -> RunFiles:
    """Raises ConfigError for what is not a run directory."""
    check_run(run_dir)
    found = RunFiles(run_dir.resolve().name or "run", attempts=provenance.read(run_dir))
    _read_config(run_dir, found)
    try:
        found.summary = parse(read_small(run_dir / SUMMARY, MOST_BYTES), dict[str, Any])
    except FileNotFoundError:
        pass  # there is none before the first attempt ends
    except (OSError, ValueError) as error:
        found.problems.append(_unreadable(SUMMARY, error))
    if not found.attempts:
        found.problems.append(f"{ATTEMPTS} is missing or damaged: attempts and versions are not known.")
    try:
        note = parse(read_small(run_dir / "heartbeat" / "rank-0.json", MOST_BYTES), dict[str, Any])
        found.heartbeat = number(note.get("written"))
    except (OSError, ValueError):
        pass
    return found


def check_run(run_dir: Path) -> None:
    """Raises ConfigError for what is not a run directory."""
    if not run_dir.is_dir():
        what = "is not a directory" if run_dir.exists() else "does not exist"
        raise ConfigError(f"{run_dir} {what}; name the directory of a run (its run.dir)")
    if (run_dir / "manifest.json").exists():
        raise ConfigError(f"{run_dir} is a checkpoint; name the directory of its run (run.dir)")
    if not any((run_dir / name).exists() for name in (METRICS, SUMMARY, *CONFIGS)):
        raise ConfigError(
            f"{run_dir} is not the directory of a run: it has no {METRICS}, {SUMMARY} or {CONFIGS[1]}; name a run.dir"
        )


def _read_config(run_dir: Path, found: RunFiles) -> None:
    """The resolved configuration, or what was asked for where that is missing."""
    for name in CONFIGS:
        try:
            content = read_small(run_dir / name, MOST_BYTES).decode()
            value = text.plain(text.read(content))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            found.problems.append(_unreadable(name, error))
            continue
        if isinstance(value, dict):
            found.config, found.config_text, found.config_name = value, content, name
            return
    if not found.problems:
        found.problems.append(f"{' and '.join(CONFIGS)} are missing: the configuration is not known.")


def _unreadable(name: str, error: Exception) -> str:
    words = " ".join(str(error.strerror if isinstance(error, OSError) else error).split())
    return f"{name} cannot be read ({words[:200]})."


def number(value: Any) -> float | None:
    """`value` if it is a number; JSON's strings for those that are not finite do not count."""
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
    )


def moment(seconds: float | None) -> str:
    """A time since 1970 as people write it, UTC."""
    try:
        return datetime.fromtimestamp(seconds or 0.0, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
