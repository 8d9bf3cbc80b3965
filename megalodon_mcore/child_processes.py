"""Processes that a training process starts end with it, however it ends.

multiprocessing ends its children when the parent leaves in order. A parent that is killed cannot,
and Megatron's checkpoint writer and its queue's server then wait for ever, each with all of
training's libraries in memory. Here every child looks after its parent by itself. (Linux could send
it a signal, but when the *thread* that started it ends, which may be long before.)
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import get_start_method
from multiprocessing.process import BaseProcess
from typing import Any

SECONDS = 0.5
"""Between two looks at the parent."""


def end_with_parent() -> None:
    """Makes every process that multiprocessing starts from here on watch this one."""
    start = BaseProcess.start
    if getattr(start, "watches", False):
        return

    @functools.wraps(start)
    def start_watching(self: BaseProcess) -> None:
        # A fork server's children are not this process's.
        if (self._start_method or get_start_method()) != "forkserver":
            self._target = functools.partial(_watch_and_run, os.getpid(), self._target)
        start(self)

    start_watching.watches = True
    BaseProcess.start = start_watching


def _watch_and_run(parent: int, target: Callable | None, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    end_with_parent()
    threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()
    if target is not None:
        target(*args, **kwargs)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    # Nothing is left to be put in order: what it was writing, nobody will finish.
    os.kill(os.getpid(), signal.SIGKILL)
