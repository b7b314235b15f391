"""Which rank holds up the others, by how far each of them is."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMED = 3


def diagnose(notes: Mapping[int, dict[str, Any] | None], hosts: Sequence[str]) -> str:
    """One sentence: the ranks that do not answer, else those that have finished least, else that none is behind.

    `notes`: the positions that the watchdogs share, by rank; None where a rank shares none.
    """
    silent = [rank for rank, note in notes.items() if note is None]
    if silent:
        return f"{_ranks(silent, hosts)} {'do' if len(silent) > 1 else 'does'} not answer"
    found: dict[int, dict[str, Any]] = {rank: note for rank, note in notes.items() if note is not None}
    least = min(tuple(note["progress"]) for note in found.values())
    behind = [rank for rank, note in found.items() if tuple(note["progress"]) == least]
    note = found[behind[0]]
    position = f"{note['where']} for {note['seconds']:.0f} s, last finished {note['finished']}"
    if len(found) > 1 and len(behind) == len(found):
        waits = ", ".join(f"rank {rank} in {found[rank]['waits_for']}" for rank in behind[:NAMED])
        return f"all {len(found)} ranks are stuck at the same place, none behind the others: {position} ({waits})"
    return f"{_ranks(behind, hosts)} {'are' if len(behind) > 1 else 'is'} stuck: {position} (in {note['waits_for']})"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:NAMED])
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
