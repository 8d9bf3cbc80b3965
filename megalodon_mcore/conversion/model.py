"""A checkpoint that is open for reading, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.parameters import Parameter


class Tokenizer(NamedTuple):
    """The tokenizer that made this model's tokens of text.

    kind is Megatron's --tokenizer-type. files are the tokenizer's own, none where it has none.
    """

    kind: str
    files: tuple[Path, ...] = ()
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass
class OpenModel:
    """A checkpoint's contents; tensors are read one at a time, when they are asked for."""

    folder: Path
    config: MegalodonConfig
    dtype: torch.dtype
    """Of all parameters that do not stay float32."""
    fetch: Callable[[Parameter], Tensor]
    """Reads one parameter as it is stored.

    Raises:
        ValueError: it is missing, or its file is damaged.
    """
    tokenizer: Tokenizer | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained, in words for a model card and the numbers to them."""
    left_out: str = ""
    """What the checkpoint has beside the model, in a sentence."""

    def read(self, parameter: Parameter, dtype: torch.dtype | None = None) -> Tensor:
        """One parameter, checked and in the type it is to be written in.

        Raises:
            ValueError: as fetch, or its shape or type is not the configuration's, or a value is
                NaN or infinite.
        """
        what = f"{parameter.hf} in {self.folder}"
        try:
            tensor = self.fetch(parameter)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{what} cannot be read: {first_line(error)}.") from None
        if tuple(tensor.shape) != parameter.shape:
            raise ValueError(
                f"{what} has shape {list(tensor.shape)}; the configuration makes it "
                f"{list(parameter.shape)}."
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{what} has type {tensor.dtype}; it takes floating point.")
        if not _all_finite(tensor):
            raise ValueError(f"{what} has NaN or infinite values.")
        return tensor.to(torch.float32 if parameter.float32 else dtype or self.dtype)

    def written_dtype(self, parameter: Parameter, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype that `read` returns it in."""
        return torch.float32 if parameter.float32 else dtype or self.dtype


def _all_finite(tensor: Tensor) -> bool:
    """Part by part, since torch casts what it sums; a sum is NaN or infinite if a value is."""
    rows = max(1, 2**20 // max(1, tensor[0].numel()))
    return all(part.sum(dtype=torch.float64).isfinite() for part in tensor.split(rows))
