"""What an attempt's end means: whether a job that restarts a run continues, waits or gives up."""

from dataclasses import dataclass
from typing import Any

REQUEUED = {75: "stopped early", 77: "text unavailable or damaged", 80: "a rank or node was lost", 137: "killed"}
FINAL = {74: "storage full or unwritable", 76: "diverged", 78: "bad configuration or input"}
FRUITLESS = 79
AT_ONCE = {128 + 2: "INT", 128 + 10: "USR1", 128 + 15: "TERM"}  # what a second signal ends with
FRUITLESS_ATTEMPTS = 3
LONGEST_WAIT_SECONDS = 3600


@dataclass(frozen=True)
class Decision:
    """What follows an attempt, and why (`words`).

    `action` is finished, requeue (no sooner than `wait` seconds from now) or end.
    """

    code: int
    action: str
    wait: int
    words: str


def decide(code: int, reason: str, *, attempt: int, limit: int, fruitless: int, outages: int, backoff: int) -> Decision:
    """What to do after an attempt that ended with `code`.

    `attempt` counts starts of this job from 1, `fruitless` those in a row that committed nothing, `outages` those in a
    row that ended with 77, the last one included in each.
    """
    if code == 0:
        return Decision(0, "finished", 0, "finished")
    because = f": {reason}" if reason else ""
    if code in FINAL:
        return Decision(code, "end", 0, f"not requeued, {FINAL[code]} ({code}){because}")
    if code not in REQUEUED:
        return Decision(code, "end", 0, f"not requeued, the program failed ({code}){because}")
    if code == 75 and reason == "run.stop_after":
        return Decision(code, "end", 0, "not requeued, run.stop_after is reached (75)")
    if fruitless >= FRUITLESS_ATTEMPTS:
        words = f"not requeued, {fruitless} attempts in a row without a new commit ({FRUITLESS}), last {code}{because}"
        return Decision(FRUITLESS, "end", 0, words)
    if attempt >= limit:
        words = f"not requeued, attempt {attempt} of at most {limit} (STABLELM_MAX_ATTEMPTS) ended ({code}){because}"
        return Decision(code, "end", 0, words)
    wait = min(backoff * 2 ** (outages - 1), LONGEST_WAIT_SECONDS) if code == 77 else 0
    words = f"requeued{f' in {wait} s' if wait else ''} after attempt {attempt}, {REQUEUED[code]} ({code}){because}"
    return Decision(code, "requeue", wait, words)


def true_code(rc: int, summary: dict[str, Any], *, before: int, started: int, launcher: str) -> tuple[int, str]:
    """Exit code and reason of an attempt that srun ended with `rc`: what its summary says, if it left one.

    `before`: attempts in provenance.json when it began, `started`: now. The launchers turn every code into 1.
    """
    code = summary.get("exit_code")
    if summary.get("attempts", 0) > before and isinstance(code, int):
        if code in AT_ONCE:
            return 137, f"a second signal ({AT_ONCE[code]}) ended it before its checkpoint was committed"
        return code, str(summary.get("reason", ""))
    if rc in REQUEUED or rc in FINAL:
        return rc, ""
    if rc in (128 + 1, 128 + 9, 128 + 10, 128 + 15):
        return 137, "its processes were killed before they could say why"
    if rc == 1 and launcher != "srun" and started > before:
        return 137, f"{launcher} lost a process that could not say why"
    if rc == 0:
        return 1, "srun ended with 0, but the run has no summary of this attempt"
    return rc, ""
