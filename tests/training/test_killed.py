"""Training that is killed, again and again, goes on from its newest checkpoint to the bit."""

import os
import random
import subprocess
import sys
import time

import psutil
import pytest

from training.program_server import TESTS
from training.runs import DROPOUT, RENDEZVOUS, TINY, train

PROGRAM = """
import sys
from training.program_server import shorten_mock_data
from megalodon_mcore.__main__ import main
shorten_mock_data()
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""
"""`megalodon-mcore pretrain` with the data of `train`'s runs."""

KILLS = {"asynchronous, one worker": 2, "asynchronous, a worker a save": 1, "synchronous": 1}
SECONDS_TO_END = 60
"""What a child gets on a machine that has much else to do."""
TRACKER = "latest_checkpointed_iteration.txt"
COMMON = (*TINY, *DROPOUT, "--train-iters", "60", "--num-workers", "2")
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
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (save.parent / "log.txt").open("a") as log:
        command = [sys.executable, "-c", PROGRAM, *arguments]
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    return train(tmp_path_factory.mktemp("whole"), *COMMON)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "one" in name else slow) for name in SAVING]
)
def test_the_newest_checkpoint_loads_and_no_child_is_left(tmp_path, whole, name):
    moments = random.Random(name)
    save = tmp_path / "checkpoint"
    saving = (*COMMON, *SAVING[name], "--save", str(save), "--save-interval", "1")
    saving = (*saving, "--load", str(save), "--save-retain-interval", "1000")
    for _ in range(KILLS[name]):
        assert kill_while_training(save, saving, moments) == []
    last = newest(save)
    resumed = train(tmp_path / "resumed", *saving)
    assert KILLS[name] <= last < 60 and list(resumed.losses) == list(range(last + 1, 61))
    assert resumed.losses == {step: whole.losses[step] for step in resumed.losses}
    assert resumed.gradient_norms == {step: whole.gradient_norms[step] for step in resumed.losses}
