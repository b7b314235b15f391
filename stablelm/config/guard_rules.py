"""Rules of `faults.*`."""

from collections.abc import Iterator

from stablelm.config.keys import values
from stablelm.config.schema import Config

_ON_A_RANK = ("faults.hang", "faults.crash", "faults.slow")


def problems(config: Config, world_size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A sentence and the keys to blame for each broken rule."""
    found = values(config)
    ranks = f"a rank from 0 to {world_size - 1}" if world_size > 1 else "rank 0, the only one,"
    for name in _ON_A_RANK:
        if found[name] is not None and (not 0 <= found[name][0] < world_size or found[name][1] < 0):
            yield (
                f"{name}={list(found[name])} must name {ranks} first, and no negative number",
                (name,),
            )
    yield from _faults(config)


def _faults(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    faults = config.faults
    asked = [name for name, value in vars(faults).items() if name != "allow" and value is not None]
    if asked and not faults.allow:
        names = tuple(f"faults.{name}" for name in asked)
        yield f"{', '.join(names)} would break the run on purpose; leave it out, or set faults.allow=true", names
    if faults.spike is not None and faults.bad_batch is None:
        yield "faults.spike needs the number of a batch; set faults.bad_batch", ("faults.spike",)
    if faults.hang_in is not None and faults.hang is None:
        yield "faults.hang_in needs a rank and a step; set faults.hang", ("faults.hang_in",)
    if "://" in str(config.checkpoint.dir):
        for name in ("corrupt_save", "full_disk"):
            if getattr(faults, name) is not None:
                key = f"faults.{name}"
                yield f"{key} needs a local checkpoint.dir, not {config.checkpoint.dir}", (key, "checkpoint.dir")
