"""The pool that the other tests here rely on."""

import os
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from distributed import pool
from distributed.pool import Pool
from distributed.test_operations import errors_of


def total(value):
    tensor = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor


def refuse(rank):
    if dist.get_rank() == rank:
        raise KeyError("nothing here")
    dist.barrier()


def leave(rank):
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def hang():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def environment():
    return torch.get_num_threads(), torch.cuda.device_count(), os.environ.get("RANK")


def gloo_threads():
    names = [task / "comm" for task in Path("/proc/self/task").iterdir()]
    return sum("gloo_tcp_loop" in name.read_text() for name in names)


def test_every_task_has_a_world_of_its_own(workers, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    for world_size in (1, 3, 2):
        results = workers.run(world_size, total, 10)
        expected = 10.0 * world_size + sum(range(world_size))
        assert results == [(rank, torch.tensor([expected])) for rank in range(world_size)]
    assert workers.run(2, environment) == [(1, 8, None)] * 2


def test_no_group_outlives_its_task(workers):
    """Megatron's own, subgroups, and those that tables of sequences' shards know."""
    fresh = workers.run(2, gloo_threads)
    workers.run(2, errors_of, 2, range(2))
    assert workers.run(2, gloo_threads) == fresh


def test_an_exception_comes_with_its_rank_and_traceback(workers):
    with pytest.raises(KeyError, match="nothing here") as caught:
        workers.run(2, refuse, 1)
    (note,) = caught.value.__notes__
    assert note.startswith("Rank 1 of 2:") and "in refuse" in note
    assert [rank for rank, _ in workers.run(2, total, 0)] == [0, 1]


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_worker_that_dies_is_named(workers, monkeypatch, seconds):
    """Also by a pool that looks late, when the other rank has failed for its lost connection."""

    def wait(*args):
        time.sleep(seconds)
        return connection.wait(*args)

    monkeypatch.setattr(pool, "wait", wait)
    with pytest.raises(RuntimeError, match="Rank 1 of 2 died with exit code 3"):
        workers.run(2, leave, 1)


def test_a_hanging_task_ends_in_time():
    hasty = Pool(timeout=2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 are not done"):
        hasty.run(2, hang)
    # Others take their places, which a busy machine does not start in 2 s.
    hasty.timeout = 60
    assert len(hasty.run(2, total, 0)) == 2
    hasty.stop()
