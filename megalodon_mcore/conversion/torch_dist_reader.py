"""Reads a torch_dist checkpoint (torch.distributed.checkpoint's format) piece by piece.

Each file `__RANK_N.distcp` is a row of tensors as torch.save writes them; `.metadata` says which
part of which tensor begins where. Nothing here needs a process group, and nothing runs code that
a file might hold: pickles may name the classes of the format and no others.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megalodon_mcore.conversion.first_line import first_line

METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
METADATA_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


class TorchDistReader:
    """A checkpoint's tensors, of which any range can be read, and objects.

    Args:
        folder: the one with `.metadata`.

    Raises:
        FileNotFoundError: it is no finished checkpoint.
        ValueError: its metadata is damaged or would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / ".metadata"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no .metadata, so no save was finished there.")
        try:
            with path.open("rb") as file:
                self.metadata: Metadata = _MetadataUnpickler(file).load()
            self.entries = self.metadata.state_dict_metadata
            self.places = self.metadata.storage_data
        except _ForbiddenError as error:
            raise ValueError(f"{path} {error}; nothing of it was run.") from None
        except Exception as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}.") from None

    def shape(self, key: str) -> tuple[int, ...] | None:
        """A whole tensor's shape; None where the checkpoint has no such tensor."""
        entry = self.entries.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def read(self, key: str, ranges: list[tuple[int, int]]) -> Tensor:
        """The part of a tensor that lies in these ranges [start, stop) of its axes.

        Raises:
            ValueError: the checkpoint lacks (a part of) it, or a file is damaged.
        """
        if self.shape(key) is None:
            raise ValueError(f"{self.folder} has no {key}.")
        result, filled = None, 0
        shape = [stop - start for start, stop in ranges]
        for chunk in self.entries[key].chunks:
            bounds = list(zip(chunk.offsets, chunk.sizes, strict=True))
            common = [
                (max(start, offset), min(stop, offset + size))
                for (start, stop), (offset, size) in zip(ranges, bounds, strict=True)
            ]
            if any(start >= stop for start, stop in common):
                continue
            stored = self._tensor(key, chunk.offsets)
            if tuple(stored.shape) != tuple(chunk.sizes):
                raise ValueError(
                    f"A part of {key} has shape {list(stored.shape)}, in {self.folder}'s metadata "
                    f"{list(chunk.sizes)}."
                )
            part = stored[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(common, bounds))]  # noqa: B905
            if list(part.shape) == shape:
                return part
            result = part.new_empty(shape) if result is None else result
            result[tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(common, ranges))] = part  # noqa: B905
            filled += part.numel()
        if result is None or filled != result.numel():
            raise ValueError(f"{self.folder} lacks a part of {key}.")
        return result

    def read_object(self, key: str, safe_globals: list[Any]) -> Any:
        """An object that is no tensor, made of plain types and these classes."""
        return self._load(MetadataIndex(key), safe_globals)

    def read_all(self, safe_globals: list[Any]) -> None:
        """Reads everything once and keeps nothing.

        Raises:
            ValueError: a file is missing or damaged, or needs other classes than these.
        """
        for index in self.places:
            self._load(index, safe_globals)

    def _tensor(self, key: str, offsets: torch.Size) -> Tensor:
        tensor = self._load(MetadataIndex(key, offsets), [])
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{key} is no tensor in {self.folder}.")
        return tensor

    def _load(self, index: MetadataIndex, safe_globals: list[Any]) -> Any:
        place = self.places.get(index)
        if place is None:
            raise ValueError(f"{self.folder} has no {index.fqn}.")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is compressed in {self.folder}, which is not supported.")
        path = self.folder / place.relative_path
        if not path.is_file():
            raise ValueError(f"{path} is missing, which has {index.fqn}.")
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if len(content) != place.length:
            raise ValueError(f"{path} is truncated: {index.fqn} is not all there.")
        return safe_load(io.BytesIO(content), f"{index.fqn} in {path}", safe_globals)


def safe_load(
    file: io.BytesIO | Path,
    what: str,
    safe_globals: list[Any],
    mmap: bool = False,
) -> Any:
    """Loads what torch.save wrote, made of tensors, plain types and these classes.

    Raises:
        ValueError: the file is damaged, or its pickle names anything else.
    """
    try:
        with torch.serialization.safe_globals(safe_globals):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        detail = next((z.strip() for z in str(error).splitlines() if "GLOBAL" in z), "")
        raise ValueError(
            f"{what} is no plain checkpoint: its pickle is damaged or would run code, and nothing "
            f"of it was run. {detail}".rstrip()
        ) from None
    except Exception as error:  # Of any kind: bytes that changed can say anything to the reader.
        # torch goes on to say what may have caused that.
        said = first_line(error).split(". ")[0]
        raise ValueError(f"{what} is damaged: {said}.") from None


class _ForbiddenError(Exception):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in METADATA_MODULES and "." not in name or (module, name) in METADATA_NAMES:
            return super().find_class(module, name)
        if module == "torch" and "." not in name:
            value = getattr(torch, name, None)
            plain = (torch.dtype, torch.layout, torch.memory_format)
            if isinstance(value, plain) or value in (torch.Size, torch.device):
                return value
        raise _ForbiddenError(f"names {module}.{name}, which is no part of a checkpoint")
