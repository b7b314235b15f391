"""Pairwise covering arrays under constraints: few cases in which every possible pair of values occurs."""

import itertools
import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

Case = dict[str, Hashable]
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]
Forbidden = Callable[[Case], bool]
"""Whether a case is not allowed; of a partial one, only what no way to fill the rest would mend."""


class Cover(NamedTuple):
    """`cases` hold every pair of `possible`; `impossible` ones are in no allowed case at all."""

    cases: list[Case]
    possible: set[Pair]
    impossible: set[Pair]


def all_pairs(axes: Mapping[str, Sequence[Hashable]]) -> list[Pair]:
    """Every pair of values of two axes, in the axes' order."""
    return [
        ((one, a), (two, b))
        for one, two in itertools.combinations(axes, 2)
        for a, b in itertools.product(axes[one], axes[two])
    ]


def pairs_of(case: Case) -> set[Pair]:
    """The pairs that a full case holds; its keys are in the axes' order."""
    return set(itertools.combinations(case.items(), 2))


def cover(axes: Mapping[str, Sequence[Hashable]], forbidden: Forbidden, seed: int) -> Cover:
    """Greedy cover: each case is built around a pair still missing, with the values that bring most others.

    A pair is impossible where the search, which is exhaustive, finds no allowed case around it. It fills the axes in
    their order, so those that exclude one another belong first.
    """
    drawer = random.Random(seed)
    missing = dict.fromkeys(all_pairs(axes))
    cases: list[Case] = []
    impossible: set[Pair] = set()
    while missing:
        pair = next(iter(missing))
        begun = None if forbidden(dict(pair)) else _with_forced(dict(pair), axes, forbidden)
        filled = None if begun is None else _fill(begun, axes, forbidden, missing.keys(), drawer)
        if filled is None:
            impossible.add(pair)
            del missing[pair]
            continue
        cases.append({axis: filled[axis] for axis in axes})
        for found in pairs_of(cases[-1]):
            missing.pop(found, None)
    return Cover(cases, set(all_pairs(axes)) - impossible, impossible)


def _with_forced(case: Case, axes: Mapping[str, Sequence[Hashable]], forbidden: Forbidden) -> Case | None:
    """With the values of axes that have no choice beside these; None where an axis has no value left.

    Otherwise the search would find that out after it has tried all values of the axes before.
    """
    while True:
        allowed = {
            axis: [value for value in values if not forbidden({**case, axis: value})]
            for axis, values in axes.items()
            if axis not in case
        }
        if not all(allowed.values()):
            return None
        forced = {axis: values[0] for axis, values in allowed.items() if len(values) == 1}
        if not forced:
            return case
        case = case | forced
        if forbidden(case):
            return None


def _fill(
    case: Case,
    axes: Mapping[str, Sequence[Hashable]],
    forbidden: Forbidden,
    missing: Collection[Pair],
    drawer: random.Random,
) -> Case | None:
    """An allowed full case with these values, None if there is none: backtracking over the other axes."""
    axis = next((name for name in axes if name not in case), None)
    if axis is None:
        return case
    shuffled = drawer.sample(axes[axis], len(axes[axis]))
    for value in sorted(shuffled, key=lambda value: _gain(case, axis, value, axes, missing), reverse=True):
        larger = {**case, axis: value}
        filled = None if forbidden(larger) else _fill(larger, axes, forbidden, missing, drawer)
        if filled is not None:
            return filled
    return None


def _gain(case: Case, axis: str, value: Hashable, axes: Mapping, missing: Collection[Pair]) -> int:
    """How many missing pairs the value makes with those of the case."""
    before = True
    count = 0
    for name in axes:
        if name == axis:
            before = False
        elif name in case:
            held, own = (name, case[name]), (axis, value)
            count += ((held, own) if before else (own, held)) in missing
    return count
