"""One cluster of three nodes for all tests of a worker process."""

from collections.abc import Iterator

import pytest
from support.slurm import Cluster, cluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with cluster(3, STC_CPUS="8", STC_KILL_WAIT="10") as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on one worker process: two clusters at a time would only slow each other down."""
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("slurm"))
