"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKS = ("config.json", "consolidate_config.json", "latest_checkpointed_iteration.txt")
"""The files that mark a model's folder: --overwrite may replace one that has any."""


@contextmanager
def new_folder(path: Path, source: Path | None, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes that name once the block is done.

    Args:
        path: the folder to make.
        source: what is read meanwhile, if anything; path may be neither in it nor around it.
        overwrite: whether path may be a checkpoint that is there.

    Raises:
        FileExistsError: path exists and may not be overwritten.
        ValueError: path and source overlap.
    """
    path, target = path.absolute(), path.resolve()
    if source is not None:
        source = source.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise ValueError(f"{path} and {source} overlap; choose another folder for the result.")
    _check(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        _to_disk(temporary)
        temporary.chmod(0o755)
        _replace(path, temporary, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(path: Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; give --overwrite to replace it.")
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and not (path.is_dir() and any((path / mark).is_file() for mark in MARKS)):
        raise FileExistsError(
            f"{path} is no checkpoint, which is all that --overwrite replaces; remove it or choose "
            "another folder."
        )


def _replace(path: Path, temporary: Path, overwrite: bool) -> None:
    _check(path, overwrite)
    if not path.exists():
        temporary.rename(path)
        return
    # The old folder is put back if the new one cannot take its name.
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    try:
        temporary.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
