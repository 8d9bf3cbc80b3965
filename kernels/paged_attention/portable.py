"""Attention over pages in torch, for any device; it copies the slots that are in use."""

import math

import torch
from torch import Tensor

from ..types import compute_dtype


def paged_attention_portable(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, room: int
) -> Tensor:
    """Same arguments and result as `paged_attention`; nothing is checked here."""
    empty = torch.arange(room, device=q.device) >= filled[:, None, None, None]
    dtype = compute_dtype(q)
    held = keys[pages, :, :room].to(dtype)
    logits = (q[:, :, None].to(dtype) @ held.mT).masked_fill_(empty, -math.inf)
    # What slots hold that are not filled was another's, and may be no number.
    held = values[pages, :, :room].masked_fill_(empty.mT, 0).to(dtype)
    return (logits.softmax(-1) @ held)[:, :, 0].to(q.dtype)
