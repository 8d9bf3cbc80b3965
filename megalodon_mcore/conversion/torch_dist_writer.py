"""Writes a torch_dist checkpoint (torch.distributed.checkpoint's format) piece by piece."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

DATA = "__0_0.distcp"


class TorchDistWriter:
    """Appends tensors and objects to one data file; `finish` makes it a checkpoint.

    Args:
        folder: an empty one, or a checkpoint.
        data: the file's name.
        metadata: the checkpoint's, to which what is written is added.
    """

    def __init__(self, folder: Path, data: str = DATA, metadata: Metadata | None = None) -> None:
        self.folder, self.data = folder, data
        self.file = (folder / data).open("wb")
        self.metadata = metadata or Metadata({}, storage_data={})
        self.entries, self.places = self.metadata.state_dict_metadata, self.metadata.storage_data

    def write(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], part: Tensor):  # noqa: ANN201
        """Adds the part of tensor `key`, which has this shape, that begins at these offsets."""
        chunk = ChunkStorageMetadata(torch.Size(offsets), part.shape)
        entry = self.entries.setdefault(
            key,
            TensorStorageMetadata(
                TensorProperties.create_from_tensor(part), torch.Size(shape), chunks=[]
            ),
        )
        entry.chunks.append(chunk)
        part = part.detach().contiguous()
        # torch.save writes a view's whole storage.
        own = part.untyped_storage().nbytes() == part.numel() * part.element_size()
        self._append(MetadataIndex(key, chunk.offsets), part if own else part.clone())

    def write_object(self, key: str, value: Any) -> None:
        """Adds an object that is no tensor."""
        self.entries[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), value)

    def finish(self) -> None:
        """Writes what makes the folder a checkpoint."""
        self.file.close()
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata))
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(backend))

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        self.file.close()

    def _append(self, index: MetadataIndex, value: Any) -> None:
        start = self.file.tell()
        torch.save(value, self.file)
        self.places[index] = _StorageInfo(self.data, start, self.file.tell() - start)
