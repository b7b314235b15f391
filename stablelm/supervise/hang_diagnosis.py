"""Which rank holds up the others, from what each says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMED = 3


def culprit(notes: Mapping[int, dict[str, Any] | None], hosts: Sequence[str]) -> str:
    """One sentence: the ranks that do not answer, else the one furthest behind and not waiting for another.

    `notes`: what `Watch.note` gives, by rank; None where a rank left none.
    """
    silent = [rank for rank, note in notes.items() if note is None]
    if silent:
        return f"{_ranks(silent, hosts)} {'do' if len(silent) > 1 else 'does'} not answer any more"
    found: dict[int, dict[str, Any]] = {rank: note for rank, note in notes.items() if note is not None}
    fewest = min(note["count"] for note in found.values())
    behind = [rank for rank, note in found.items() if note["count"] == fewest]
    suspects = [rank for rank in behind if not found[rank]["collective"]] or behind
    note = found[suspects[0]]
    place = f"{note['where']}, in {note['waits_for']}, for {note['seconds']:.0f} s"
    if len(found) > 1 and len(suspects) == len(found):
        return f"all {len(found)} ranks are stuck at the same place, none behind the others: {place}"
    return f"{_ranks(suspects, hosts)} {'are' if len(suspects) > 1 else 'is'} stuck: {place}"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:NAMED])
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
