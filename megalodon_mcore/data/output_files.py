"""How `prepare-data` puts files in place: all of them finished, or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalodon_mcore.data.metadata import PreparedData, metadata_path
from megalodon_mcore.folder_lock import LOCK, lock_folder


def existing_outputs(prefix: Path, names: dict[str, str]) -> list[Path]:
    """The files that writing these datasets would replace, or leave behind from an earlier run."""
    stems = [prefix.parent / name for name in names.values()]
    sidecar = metadata_path(prefix)
    if sidecar.exists():
        try:
            stems += [Path(info.prefix) for info in PreparedData.load(prefix).datasets.values()]
        except (ValueError, TypeError, KeyError):
            pass  # a damaged sidecar is replaced as well
    files = [sidecar, *(Path(f"{stem}{ending}") for stem in stems for ending in (".idx", ".bin"))]
    return [file for file in dict.fromkeys(files) if file.exists()]


@contextmanager
def no_new_folder_on_failure(folder: Path) -> Iterator[None]:
    """Removes the folder if it is new and alone: another run may use it that writes beside it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.exists() and list(folder.parent.iterdir()) == [folder]:
            shutil.rmtree(folder)
        raise


@contextmanager
def unfinished_folder(prefix: Path) -> Iterator[Path]:
    """The folder PREFIX.unfinished, empty, held by this process alone, and gone afterwards."""
    folder = prefix.parent / f"{prefix.name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "The folder of --output-prefix"):  # a killed run holds no lock
        try:
            for leftover in folder.iterdir():
                if leftover.name != LOCK:
                    leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder)


def publish(prefix: Path, folder: Path, names: list[str], old_files: list[Path]) -> None:
    """Move finished files into place: the data, then the indices, then the sidecar, so that at no
    moment does anything half-written look finished."""
    new = [f"{name}{ending}" for ending in (".bin", ".idx") for name in names]
    for name in [*new, "meta.json"]:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    for old in old_files:  # the sidecar comes first
        old.unlink()
    for name in new:
        os.rename(folder / name, prefix.parent / name)
    os.rename(folder / "meta.json", metadata_path(prefix))
