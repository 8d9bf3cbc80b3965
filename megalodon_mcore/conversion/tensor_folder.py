"""A Hugging Face folder's tensors, in one file or in shards with an index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megalodon_mcore.conversion.json_file import read_object, write_object
from megalodon_mcore.conversion.safetensors_file import (
    Entry,
    open_safetensors,
    write_safetensors,
)
from megalodon_mcore.conversion.torch_dist_reader import safe_load

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class TensorFolder:
    """A folder's tensors by name; each is read when it is asked for.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, would run code, or is not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = self._files()
        self._open = {
            name: open_safetensors(folder / name)
            if name.endswith(".safetensors")
            else _open_pickled(folder / name)
            for name in files
        }
        self._place: dict[str, str] = {}
        for name, opened in self._open.items():
            for key in opened.keys():
                if key in self._place:
                    raise ValueError(f"{folder} has {key} twice: {self._place[key]} and {name}.")
                self._place[key] = name

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self._place)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: it is missing or damaged.
        """
        if name not in self._place:
            raise ValueError(f"{self.folder} has no {name}.")
        opened = self._open[self._place[name]]
        tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor in {self.folder}.")
        return tensor

    def _files(self) -> list[str]:
        for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
            if (self.folder / index).is_file():
                weights = read_object(self.folder / index).get("weight_map")
                if not isinstance(weights, dict) or not weights:
                    raise ValueError(f"{self.folder / index} has no weight_map.")
                for name in weights.values():
                    if not isinstance(name, str) or Path(name).name != name:
                        raise ValueError(
                            f"{self.folder / index} names {name!r}, no file beside it."
                        )
                return sorted(set(weights.values()))
            if (self.folder / single).is_file():
                return [single]
        raise FileNotFoundError(f"{self.folder} has neither {SINGLE} nor {INDEX}.")


def _open_pickled(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    opened = safe_load(path, str(path), [], mmap=True)
    if not isinstance(opened, dict) or not all(isinstance(name, str) for name in opened):
        raise ValueError(f"{path} holds no tensors by name.")
    return opened


def write_tensor_folder(
    folder: Path, entries: list[Entry], tensors: Iterable[Tensor], max_shard_size: int
) -> None:
    """Writes model.safetensors, or shards of at most so many bytes (or one tensor) and an index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        size = sum(other.nbytes for other in shards[-1])
        if shards[-1] and size + entry.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(entry)
    stream = iter(tensors)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE if len(shards) == 1 else name
        write_safetensors(folder / name, shard, (next(stream) for _ in shard))
        names |= {entry.name: name for entry in shard}
    # So that whatever wraps the loop over tensors sees its end.
    for _ in stream:
        raise ValueError("There are more tensors than entries.")
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries)
        values = sum(torch.Size(entry.shape).numel() for entry in entries)
        metadata = {"total_parameters": values, "total_size": total}
        write_object(folder / INDEX, {"metadata": metadata, "weight_map": names})
