"""Training that is killed, again and again, goes on from its newest checkpoint to the bit."""

import os
import random
import subprocess
import sys
import time

import psutil
import pytest

from training.runs import (
    DROPOUT,
    PRETRAIN,
    RENDEZVOUS,
    TINY,
    side_by_side,
    train,
)

KILLS = {"asynchronous, one worker": 2, "asynchronous, a worker a save": 1, "synchronous": 1}
SECONDS_TO_END = 60
"""What a child gets on a machine that has much else to do."""
TRACKER = "latest_checkpointed_iteration.txt"
ITERATIONS = ("--train-iters", "60", "--num-workers", "2")
ASYNC = ("--async-save", "--async-strategy", "mcore")
SAVING = {
    "asynchronous, one worker": (*ASYNC, "--use-persistent-ckpt-worker"),
    "asynchronous, a worker a save": ASYNC,
    "synchronous": (),
}
slow = pytest.mark.slow


def newest(save):
    tracker = save / TRACKER
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def kill_while_training(save, arguments, moments):
    """Starts training and kills it at a random moment after one more checkpoint is complete.

    Returns its children that are still there after SECONDS_TO_END.
    """
    before = newest(save)
    environment = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (save.parent / "log.txt").open("a") as log:
        command = [sys.executable, *PRETRAIN, *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while newest(save) == before:
            assert process.poll() is None, (save.parent / "log.txt").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        assert process.poll() is None, "training ended before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + SECONDS_TO_END
    while (left := [child for child in children if alive(child)]) and time.monotonic() < end:
        time.sleep(0.1)
    described = [(child.cmdline(), child.status()) for child in left if alive(child)]
    for child in left:
        child.kill()
    return described


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "one" in name else slow) for name in SAVING]
)
def test_the_newest_checkpoint_loads_and_no_child_is_left(tmp_path, name):
    moments = random.Random(name)
    save = tmp_path / "checkpoint"
    common = (*TINY, *DROPOUT, *ITERATIONS)
    saving = (*common, *SAVING[name], "--save", str(save), "--save-interval", "1")
    saving = (*saving, "--load", str(save), "--save-retain-interval", "1000")

    def killed_and_resumed():
        for _ in range(KILLS[name]):
            assert kill_while_training(save, saving, moments) == []
        last = newest(save)
        return last, train(tmp_path / "resumed", *saving)

    whole, (last, resumed) = side_by_side(
        lambda: train(tmp_path / "whole", *common), killed_and_resumed
    )
    assert KILLS[name] <= last < 60 and list(resumed.losses) == list(range(last + 1, 61))
    assert resumed.losses == {step: whole.losses[step] for step in resumed.losses}
    assert resumed.gradient_norms == {step: whole.gradient_norms[step] for step in resumed.losses}
