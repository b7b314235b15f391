"""Runs a function on several gloo ranks, each its own process, and brings back what each returned or raised."""

import faulthandler
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from support.forked import adopt, server

GRACE = 10.0  # seconds that the other ranks get to report once one has failed


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls function(rank, world_size, *args) on every rank and returns the picklable results in rank order.

    `function` must be importable (module level of a test file). Each rank has one torch thread, the variables of
    torchrun and an initialised gloo group, which is destroyed at the end. Raises RuntimeError with the tracebacks if
    a rank raises or dies, TimeoutError if they take more than `timeout` seconds (stacks go to stderr); no process is
    left behind.
    """
    import torch.distributed as dist

    context = server()
    # The parent's store owns the port, so no other process can take it between choosing and using.
    host = ("127.0.0.1", 0)
    store = dist.TCPStore(*host, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, dict(os.environ), function, rank, world_size, store.port, args, timeout)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(pipes, processes, timeout)
    finally:
        for process in processes:
            process.join(2 if process.exitcode is None else 0)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(failures) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(5)
                succeeded, value = False, f"died with exit code {processes[rank].exitcode}"
            (results if succeeded else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE)
    for process in processes:
        if failures or len(results) < len(pipes):
            process.kill()
    if failures:
        raise RuntimeError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    if len(results) < len(pipes):
        raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in {timeout} s")
    return [results[rank] for rank in range(len(pipes))]


def _child(
    sender: Connection,
    environ: dict[str, str],
    function: Callable,
    rank: int,
    world_size: int,
    port: int,
    args: tuple,
    timeout: float,
) -> None:
    adopt(environ)
    import torch
    import torch.distributed as dist

    faulthandler.dump_traceback_later(max(1.0, timeout - 2), file=2)
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store lives in the parent, as under torchrun
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        try:
            result = (True, function(rank, world_size, *args))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        message = pickle.dumps(result)
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    sender.send_bytes(message)
    sender.close()
