"""Attention over pages as written, in float64: the oracle of the fast paths."""

import torch
from torch import Tensor


def paged_attention_naive(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, room: int | None = None
) -> Tensor:
    """Same arguments as `paged_attention`; the result is float64."""
    out = q.new_empty(*q.shape[:2], values.shape[-1], dtype=torch.float64)
    for r, (page, n) in enumerate(zip(pages.tolist(), filled.tolist(), strict=True)):
        for h in range(q.shape[1]):
            weights = (keys[page, h, :n].double() @ q[r, h].double()).softmax(0)
            out[r, h] = weights @ values[page, h, :n].double()
    return out
