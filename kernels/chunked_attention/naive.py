"""Chunked causal attention one query at a time in float64: the oracle of the fast paths."""

import torch
from torch import Tensor

from .state import AttentionState


def chunked_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    state: AttentionState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Same arguments as `chunked_attention`, without dropout; results are float64."""
    q, k, v = q.double(), k.double(), v.double()
    cached = 0
    if state is not None:
        cached = state.key.shape[1]
        k = torch.cat([state.key.double(), k], dim=1)
        v = torch.cat([state.value.double(), v], dim=1)

    outputs = []
    for t in range(q.shape[1]):
        position = cached + t
        start = position - position % chunk_size
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, start : position + 1])
        weights = scores.softmax(-1)
        outputs.append(torch.einsum("bhs,bshe->bhe", weights, v[:, start : position + 1]))

    out = torch.stack(outputs, dim=1) if outputs else v[:, cached:]
    if not return_state:
        return out, None
    filled = k.shape[1] - k.shape[1] % chunk_size
    return out, AttentionState(k[:, filled:], v[:, filled:])
