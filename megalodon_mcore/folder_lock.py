"""Keeps two processes from working in the same folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK = ".lock"


def lock_folder(folder: Path, option: str) -> IO[str]:
    """Takes a folder for this process.

    Args:
        folder: it exists.
        option: whose value it is.

    Returns:
        A file that holds it until it is closed, here and in processes that inherit it.

    Raises:
        ValueError: another process has it.
    """
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"{option} is {folder}, in which another process is at work; wait for it or end it."
        ) from None
    os.set_inheritable(lock.fileno(), True)
    return lock
