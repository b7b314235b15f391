"""Phases that all ranks run together and in which all of them fail together, so that none waits for ever."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from stablelm.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another rank's failure, in its words; `relayed` where that rank had it from a third, by a phase in a phase."""

    relayed = False


class Consensus:
    """Runs phases on every rank of `group` (None: this process alone); rank is the one inside the group.

    After each phase the ranks exchange their results or failures. If any failed, rank 0 calls `undo` and then every
    rank raises: the first UserError there is, else the failure of the lowest failed rank (on other ranks as
    FailedElsewhere with its words). A rank that dies is not seen here: the collectives themselves raise then.
    `reached` is called with the part's name once this rank has acted, before it waits for the others.
    """

    def __init__(self, group: "ProcessGroup | None", rank: int, reached: Callable[[str], None] = lambda part: None):
        self.group = group
        self.rank = rank
        self.undo: Callable[[], None] = lambda: None
        self.reached = reached

    @property
    def size(self) -> int:
        """The number of ranks."""
        if self.group is None:
            return 1
        import torch.distributed as dist

        return dist.get_world_size(self.group)

    def run(self, action: Callable[[], T], part: str = "") -> list[T]:
        """Every rank acts; every rank gets the (picklable) values of all, in rank order."""
        value, error = None, None
        try:
            value = action()
        except Exception as caught:
            error = caught
        self.reached(part)
        values, failures = self._exchange(value, error)
        if failures:
            self._fail(failures, error)
        return values

    def first(self, action: Callable[[], T], part: str = "") -> T:
        """Rank 0 acts; every rank gets its (picklable) value."""
        return self.run(lambda: action() if self.rank == 0 else None, part)[0]  # type: ignore[return-value]

    def _exchange(self, value, error: Exception | None) -> tuple[list, dict[int, Exception]]:
        if self.group is None:
            return [value], {} if error is None else {self.rank: error}
        import torch.distributed as dist

        # Foreign exceptions may not survive pickling: only their words travel.
        sent = error if error is None or isinstance(error, UserError) else _described(self.rank, error)
        reports: list = [None] * self.size
        dist.all_gather_object(reports, (value, sent), group=self.group)
        return [report[0] for report in reports], {r: e for r, (_, e) in enumerate(reports) if e is not None}

    def _fail(self, failures: dict[int, Exception], own: Exception | None) -> None:
        if self.rank == 0:
            self.undo()
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(group=self.group)  # nobody returns before the undoing is done

        def order(rank: int) -> tuple[bool, bool, int]:
            failure = failures[rank]
            return not isinstance(failure, UserError), getattr(failure, "relayed", False), rank

        chosen = min(failures, key=order)
        if chosen == self.rank and own is not None:
            raise own
        raise failures[chosen] from own


def _described(rank: int, error: Exception) -> FailedElsewhere:
    if isinstance(error, FailedElsewhere):
        described = FailedElsewhere(str(error))
        described.relayed = True  # pickled along with the rest of its attributes
        return described
    return FailedElsewhere(f"rank {rank} failed: {type(error).__name__}: {error}")
