"""What a soak proves: the checks that decide whether the run passed, and the page that tells of it."""

import json
import platform
import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from support.punisher import KINDS
from support.slurm import records
from support.soaking import EVERY, Soak, Strike

TOKENS_A_STEP = 12 * 32


def problems(soak: Soak, expected: dict[int, float], *, background: bool) -> list[str]:
    """What is wrong with the punished run; empty where all is as it should be. `expected`: undisturbed losses."""
    run_dir, found = soak.run_dir, records(soak.run_dir)
    allowed = EVERY if not background else 2 * EVERY - 1
    return [
        *not_struck(soak.strikes, soak.planned),
        *bad_end(soak.job().get("JobState", "unknown"), read_summary(run_dir), len(expected)),
        *other_records(found, expected),
        *bad_commits(run_dir, soak.rewritten),
        *too_much_again(recomputed(found), soak.strikes, allowed),
    ]


def not_struck(strikes: list[Strike], planned: list[str]) -> list[str]:
    """Planned faults that did not strike, faults without recovery."""
    missing = Counter(planned) - Counter(one.kind for one in strikes)
    found = [f"{missing.total()} of {len(planned)} faults did not strike: {dict(missing)}"] if missing else []
    return found + [f"no recovery from {one.kind} at step {one.step}" for one in strikes if one.recovered is None]


def bad_end(state: str, summary: dict[str, Any], steps: int) -> list[str]:
    found = []
    code, tokens = summary.get("exit_code"), summary.get("tokens")
    if state != "COMPLETED" or code != 0:
        found.append(f"the job is {state} and the run's exit code {code}: {summary.get('reason')}")
    if tokens != steps * TOKENS_A_STEP:
        found.append(f"{tokens} tokens instead of {steps * TOKENS_A_STEP}")
    return found


def other_records(found: list[dict[str, Any]], expected: dict[int, float]) -> list[str]:
    """Records, those of steps made again included, that differ in any bit of the loss or in the tokens up to them."""
    wrong = sorted({r["step"] for r in found if r["loss"] != expected.get(r["step"])})
    shifted = sorted({r["step"] for r in found if r["tokens"] != r["step"] * TOKENS_A_STEP})
    missing = sorted(set(expected) - {r["step"] for r in found})
    return [
        f"{len(steps)} {what}, the first at step {steps[0]}"
        for what, steps in (("losses differ", wrong), ("token counts differ", shifted), ("steps are missing", missing))
        if steps
    ]


def bad_commits(run_dir: Path, rewritten: Iterable[str]) -> list[str]:
    """Steps committed twice or behind a newer attempt's back, damaged checkpoints."""
    from stablelm.checkpoint import manifest

    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    damaged = {path.name: told for path in folders if (told := manifest.verify(path))}
    found = [f"damaged checkpoints: {damaged}"] if damaged else []
    found += [f"committed twice: {name}" for name in sorted(rewritten)]
    whole = [manifest.read_commit(path) for path in folders if path.name not in damaged]
    found += [
        f"step {later.step} was committed with token {later.token}, step {earlier.step} before it with {earlier.token}"
        for earlier, later in pairwise(whole)
        if later.token < earlier.token
    ]
    return found


def recomputed(found: list[dict[str, Any]]) -> dict[int, int]:
    """Steps that each attempt made again, though an earlier one had made them."""
    again: dict[int, int] = {}
    highest = 0
    for record in found:
        again.setdefault(record["attempt"], max(0, highest - record["step"] + 1))
        highest = max(highest, record["step"])
    return again


def too_much_again(again: dict[int, int], strikes: list[Strike], allowed: int) -> list[str]:
    """Faults after which more than `allowed` steps were made again; faults of one attempt are counted together."""
    struck = Counter(one.attempt for one in strikes)
    attempts = sorted(struck)
    found = []
    for attempt, following in zip(attempts, [*attempts[1:], max(again, default=0)], strict=True):
        steps = sum(count for number, count in again.items() if attempt < number <= max(following, attempt))
        if steps > struck[attempt] * allowed:
            found.append(f"{steps} steps were made again after {struck[attempt]} fault(s) of attempt {attempt}")
    return found


def read_summary(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def ends(run_dir: Path, strikes: list[Strike]) -> dict[str, Counter[str]]:
    """By kind of fault, the codes with which attempts ended after it; – for one that ended without a word."""
    path = run_dir / "slurm" / "attempts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: dict[str, Counter[str]] = {}
    for one, later in pairwise([*strikes, None]):
        assert one is not None
        until = later.time if later else float("inf")
        codes = [str(line["code"]) for line in lines if line.get("code") and one.time < line["time"] + 1 <= until]
        if not codes and one.begun is not None:
            codes = ["–"]
        found.setdefault(one.kind, Counter()).update(codes)
    return found


def page(soak: Soak, command: str, seed: int, wrong: list[str]) -> str:
    """The report as Markdown."""
    again, codes = recomputed(records(soak.run_dir)), ends(soak.run_dir, soak.strikes)
    struck = {kind: found for kind in KINDS if (found := [s for s in soak.strikes if s.kind == kind])}
    passed = (
        "The run finished by itself. Every loss equals the undisturbed run's bit for bit, repeated steps "
        "included. No step was committed twice, no token was lost or repeated."
    )
    lines = [
        "# Soak", "",
        f"`{command}` (seed {seed}): {len(soak.strikes)} faults of {len(struck)} kinds struck a run of {soak.steps} "
        "steps on 4 ranks and 2 of 4 nodes of the test cluster. "
        f"It took {soak.now() / 60:.0f} minutes on {platform.system()}.", "",
        "**" + ("Failed: " + "; ".join(wrong) + "." if wrong else passed) + "**", "",
        f"- attempts: {soak.starts()}",
        f"- commits: {len(soak.commits)}, one every {EVERY} steps and one at each stop",
        f"- repeated steps: {sum(again.values())} in all, at most {max(again.values(), default=0)} by one attempt",
        f"- cold start, from sbatch to the first step: {soak.cold_start:.0f} s", "",
        "Medians in seconds from the fault; – if the attempt continued.", "",
        "| fault | times | attempts ended with | back in the queue | next attempt begins | next new step |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, found in struck.items():
        ended = ", ".join(f"{code} × {n}" if n > 1 else code for code, n in codes[kind].items()) or "–"
        times = [_middle([getattr(s, name) for s in found]) for name in ("requeued", "begun", "recovered")]
        lines.append(f"| {kind} | {len(found)} | {ended} | {' | '.join(times)} |")
    lines += [
        "",
        "In order:",
        "",
        "| second | fault | step | attempt | next new step after, s |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {s.at:.0f} | {s.kind} | {s.step} | {s.attempt} | {_middle([s.recovered])} |" for s in soak.strikes]
    return "\n".join(lines) + "\n"


def _middle(values: list[float | None]) -> str:
    seen = [value for value in values if value is not None]
    return f"{statistics.median(seen):.0f}" if seen else "–"
