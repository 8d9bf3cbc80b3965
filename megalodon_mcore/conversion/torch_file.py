"""Writes what torch.save would, with one tensor at a time in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megalodon_mcore.tensor_digest import raw_bytes


class TorchFile:
    """A file for a dict of tensors, laid out first and filled in any order.

    torch.save writes it with room for the data (torch.serialization.skip_data), torch.load tells
    where each tensor lies. The zip's checksums are those of the room; torch.load asks for none.

    Args:
        path: the file.
        shapes: every tensor's shape and type, in the order of the dict.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        with FakeTensorMode():
            empty = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, path)
        with FakeTensorMode():
            placed = torch.load(path, weights_only=True)
        self.offsets = {n: t.untyped_storage()._checkpoint_offset for n, t in placed.items()}
        self.shapes = shapes
        self.file = path.open("r+b")

    def write(self, name: str, tensor: Tensor) -> None:
        """Fills in one tensor.

        Raises:
            ValueError: it is not what was announced.
        """
        if (tuple(tensor.shape), tensor.dtype) != self.shapes[name]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as announced.")
        self.file.seek(self.offsets[name])
        self.file.write(raw_bytes(tensor))

    def close(self) -> None:
        """Lets go of the file."""
        self.file.close()
