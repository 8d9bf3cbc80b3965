"""Safetensors files: written with one tensor at a time in memory, opened with clear errors.

The format is the length of a JSON header (uint64, little-endian), the header, and the tensors'
bytes one after the other (github huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.tensor_digest import raw_bytes

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: list[Entry], tensors: Iterable[Tensor]) -> None:
    """Writes tensors, in the order of their entries.

    Raises:
        ValueError: a tensor is not what its entry says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} is {tensor.dtype} {list(tensor.shape)}, not {entry}."
                )
            file.write(raw_bytes(tensor))


def open_safetensors(path: Path) -> Any:
    """An open file of which tensors are read one by one.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {first_line(error)}.") from None
