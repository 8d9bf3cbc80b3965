"""Processes that a training process starts end with it, however it ends.

multiprocessing ends its children when the parent leaves in order. A parent that is killed cannot,
and Megatron's checkpoint writer and its queue's server then wait for ever, each with all of
training's libraries in memory. Here every child looks after its parent by itself. (Linux could send
it a signal, but when the *thread* that started it ends, which may be long before.)
"""

from __future__ import annotations

import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

SECONDS = 0.5
"""Between two looks at the parent, where the system does not tell of its end."""


def end_with_parent() -> None:
    """Makes every process that multiprocessing starts from here on watch this one."""
    start = BaseProcess.start
    if getattr(start, "watches", False):
        return

    @functools.wraps(start)
    def start_watching(self: BaseProcess) -> None:
        self._target = functools.partial(_run, _Parent(os.getpid()), self._target)
        start(self)

    start_watching.watches = True
    BaseProcess.start = start_watching


class _Parent:
    """A process to watch, from when this is unpickled in another: before what follows it is, since
    that may import all of training's libraries.
    """

    def __init__(self, process: int) -> None:
        self.process = process
        self.watcher: int | None = None

    def __reduce__(self) -> tuple:
        return _watched, (self.process,)

    def watch(self) -> None:
        """Starts to, if this process, which may have been forked, does not yet."""
        if self.watcher != os.getpid():
            self.watcher = os.getpid()
            target, args = _watch, (self.process,)
            threading.Thread(target=target, args=args, name="parent watch", daemon=True).start()


def _watched(process: int) -> _Parent:
    parent = _Parent(process)
    parent.watch()
    return parent


def _run(parent: _Parent, target: Callable | None, *args: Any, **kwargs: Any) -> None:
    parent.watch()
    end_with_parent()
    if target is not None:
        target(*args, **kwargs)


def _watch(process: int) -> None:
    """Waits for a process, which need not be this one's parent: a fork server may be."""
    try:
        descriptor = os.pidfd_open(process)
        select.select([descriptor], [], [])
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):  # No Linux, or an old one.
        while _exists(process):
            time.sleep(SECONDS)
    # Nothing is left to be put in order: what it was writing, nobody will finish.
    os.kill(os.getpid(), signal.SIGKILL)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
