"""Worker processes over gloo, kept from test to test, in which a layout's ranks run.

    losses = pool.run(4, train, layout)  # one result per rank

They are forked from a server that has torch and Megatron loaded and the CPU standing in for CUDA.
Each task gets a process group of its own; one that fails or hangs costs the workers their lives.
"""

import gc
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TESTS = Path(__file__).parents[1]
WORKERS = 8
"""The most that a task can have. Each has a stand-in device of its own."""
SECONDS_TO_DIE = 10
"""From a lost connection to the end of the process that had its other end, on a busy machine."""


class Pool:
    """Starts workers when they are first needed; `stop` ends them."""

    def __init__(self, timeout: float = 600) -> None:
        self.timeout = timeout
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None
        self._tasks = 0

    def run(self, world_size: int, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls a module's function in every rank of a fresh world; returns the ranks' results.

        Raises:
            TimeoutError: not all ranks were done in time.
            Exception: the first that a rank raised, with that rank's traceback as a note.
        """
        self._start(world_size)
        self._tasks += 1
        ranks = self._workers[:world_size]
        try:
            for rank, worker in enumerate(ranks):
                world = (self._store.port, f"task {self._tasks}", rank, world_size, self.timeout)
                worker.connection.send_bytes(pickle.dumps((world, function, args, kwargs)))
            return self._collect(ranks)
        except BaseException:
            # The other ranks may be waiting for the one that failed.
            self.kill()
            raise

    def stop(self) -> None:
        """Lets the workers end."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(5)
        self.kill()
        self._store = None

    def kill(self) -> None:
        """Ends the workers whatever they do; the next task gets new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self, world_size: int) -> None:
        if world_size > WORKERS:
            raise ValueError(f"{world_size} ranks are wanted; the pool has {WORKERS}.")
        self._store = self._store or dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distributed.preload"])
        with _tests_in_python_path():
            while len(self._workers) < world_size:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there,), daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(process, here))

    def _collect(self, ranks: list["_Worker"]) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout
        while len(results) < len(ranks):
            waited_for = {w.connection: r for r, w in enumerate(ranks) if r not in results}
            ready = wait(list(waited_for), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"After {self.timeout} s, ranks {sorted(waited_for.values())} of {len(ranks)} "
                    "are not done."
                )
            for connection in ready:
                rank = waited_for[connection]
                try:
                    results[rank] = ranks[rank].result(rank, len(ranks))
                except RuntimeError:
                    # It may have lost its connection to a rank that died, and be heard first.
                    _name_the_dead(ranks)
                    raise
        return [results[rank] for rank in range(len(ranks))]


class _Worker:
    def __init__(self, process: multiprocessing.Process, connection: Connection) -> None:
        self.process = process
        self.connection = connection

    def result(self, rank: int, world_size: int) -> Any:
        try:
            value, error, trace = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            raise self.death(rank, world_size) from None
        if error is not None:
            error.add_note(f"Rank {rank} of {world_size}:\n{trace}")
            raise error
        return value

    def death(self, rank: int, world_size: int) -> RuntimeError:
        self.process.join()
        return RuntimeError(
            f"Rank {rank} of {world_size} died with exit code {self.process.exitcode}."
        )


def _name_the_dead(ranks: list[_Worker]) -> None:
    ended = wait([worker.process.sentinel for worker in ranks], SECONDS_TO_DIE)
    for rank, worker in enumerate(ranks):
        if worker.process.sentinel in ended:
            raise worker.death(rank, len(ranks)) from None


@contextmanager
def _tests_in_python_path():
    """Python 3.12's fork server does not have its parent's sys.path when it preloads."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(connection: Connection) -> None:
    """A worker's life: tasks until the pool closes its end of the connection."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(task))


def _die_with_parent() -> None:
    """Also where the main thread is busy, or waits for a rank that is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _answer(task: bytes) -> bytes:
    """The pickled result, or the exception and its traceback, of a task."""
    try:
        (port, name, rank, world_size, timeout), function, args, kwargs = pickle.loads(task)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        torch.cuda.set_device(rank)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = function(*args, **kwargs)
        _leave_world()
        return pickle.dumps((value, None, None))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            return pickle.dumps((None, pickle.loads(pickle.dumps(error)), trace))
        except Exception:
            return pickle.dumps((None, RuntimeError(repr(error)), trace))


def _leave_world() -> None:
    """Ends every group: each has threads that look for work a hundred times a second."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    for name, value in vars(parallel_state).items():
        # Two of them Megatron 0.19 forgets.
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    # Models are cycles that hold their groups.
    gc.collect()
