"""The folder of an evaluation: results, plots, and a state that a stopped run goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.folder_lock import lock_folder
from megalodon_mcore.whole_file import write_whole

STATE = "state.safetensors"
RESULTS = "results.json"
PLOTS = ("positions.png", "retrieval.png")


class RunFolder:
    """Makes or reopens the folder, and keeps it for this process until it is closed.

    Args:
        path: the folder; what is there must be a run of the same identity, or empty.
        identity: all that the results depend on, as JSON.
        overwrite: begin anew where there is a run.
        save_every: seconds between two states.

    Attributes:
        state: the counts that an earlier run saved, empty where there was none.
        arrays: its arrays by name.

    Raises:
        ValueError: the folder cannot be written or another process is at work in it, or its state
            is damaged or of another run.
        FileExistsError: it holds something else.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], overwrite: bool, save_every: float
    ) -> None:
        self.path, self.identity, self.save_every = path, identity, save_every
        self.state: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        self._saved = time.monotonic()
        try:
            path.mkdir(parents=True, exist_ok=True)
            # A file that a killed run left unfinished has a dot before its name.
            found = any(not file.name.startswith(".") for file in path.iterdir())
        except OSError as error:
            raise self._unwritable(error) from None
        if found and not (path / STATE).is_file():
            raise FileExistsError(
                f"--output is {path}, which holds other things than an evaluation; choose a new "
                "folder."
            )
        try:
            self._lock = lock_folder(path, "--output")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._open(overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool) -> None:
        if not (self.path / STATE).is_file():
            return
        if not overwrite:
            return self._reopen()
        # The state last: without it the rest would be somebody else's.
        for name in (RESULTS, *PLOTS, STATE):
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves the folder to other processes."""
        self._lock.close()

    def _reopen(self) -> None:
        from safetensors import safe_open

        from megalodon_mcore.tensor_digest import tensor_digest

        try:
            with safe_open(self.path / STATE, "pt") as file:
                metadata = file.metadata()
                self.arrays = {name: file.get_tensor(name) for name in file.keys()}
            if tensor_digest(self.arrays, metadata["run"]) != metadata["digest"]:
                raise ValueError("its bytes changed")
            held = json.loads(metadata["run"])
            identity, self.state = held["identity"], held["state"]
        except Exception as error:
            raise ValueError(
                f"{self.path / STATE} is damaged ({first_line(error)}); begin anew with "
                "--overwrite."
            ) from None
        for name in self.identity | identity:
            if identity.get(name) != self.identity.get(name):
                was, now = (str(z.get(name))[:80] for z in (identity, self.identity))
                raise ValueError(
                    f"--output is {self.path}, which holds a run whose {name} was {was} and is now "
                    f"{now}; choose another folder, or begin anew with --overwrite."
                )

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.save_every

    def save(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Writes the state, whole or not at all.

        Args:
            state: as JSON.
            arrays: tensors or arrays by name.
        """
        import torch
        from safetensors.torch import save

        from megalodon_mcore.tensor_digest import tensor_digest

        tensors = {
            name: torch.from_numpy(array) if isinstance(array, np.ndarray) else array
            for name, array in arrays.items()
        }
        held = json.dumps({"identity": self.identity, "state": state})
        content = save(tensors, {"run": held, "digest": tensor_digest(tensors, held)})
        self.write(STATE, lambda path: path.write_bytes(content))
        self._saved = time.monotonic()

    def write_results(self, values: dict[str, Any]) -> None:
        """Writes results.json."""
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.write(RESULTS, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, make: Callable[[Path], object]) -> None:
        """Makes a file of the folder, which takes its name once it is whole.

        Raises:
            ValueError: it cannot be written.
        """
        try:
            write_whole(self.path / name, make)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"--output is {self.path}, which cannot be written ({first_line(error)}); choose "
            "another folder."
        )
