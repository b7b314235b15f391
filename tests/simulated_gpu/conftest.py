"""One process for all simulations of a worker of pytest, and all of them in one worker."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu import fake_cuda, worker

Simulator = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("simulated_gpu"))


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    """Calls a function of a module, with arguments, where there is a simulated GPU."""
    if reason := fake_cuda.obstacle():
        pytest.skip(reason)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=worker.start) as pool:
        yield lambda *call, **options: pool.submit(partial(worker.call, *call, **options)).result()
