"""Chunked causal attention one query at a time in float64: the oracle of the fast paths."""

import torch
from torch import Tensor

from ..segments import Segments
from .state import AttentionState


def chunked_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    segments: Segments | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Same arguments as `chunked_attention`, without dropout; results are float64."""
    length, batch = q.shape[:2]
    segments = segments or Segments.of_rows(length, batch)
    q, k, v = q.double(), k.double(), v.double()

    out, used = torch.empty_like(v), 0
    open_keys, open_values = ([z[:0].flatten(0, 1)] for z in (k, v))
    for segment in segments:
        keys, values = (z[segment.steps, segment.row] for z in (k, v))
        cached = segment.position % chunk_size
        if cached:
            held = slice(used, used + cached)
            keys = torch.cat([state.key[held].double(), keys])
            values = torch.cat([state.value[held].double(), values])
            used += cached
        outputs = []
        for t in range(segment.length):
            stop = cached + t + 1
            start = (stop - 1) - (stop - 1) % chunk_size
            query = q[segment.start + t, segment.row]
            weights = torch.einsum("hd,shd->hs", query, keys[start:stop]).softmax(-1)
            outputs.append(torch.einsum("hs,she->he", weights, values[start:stop]))
        out[segment.steps, segment.row] = torch.stack(outputs)
        filled = len(keys) - len(keys) % chunk_size
        open_keys.append(keys[filled:])
        open_values.append(values[filled:])

    if not return_state:
        return out, None
    return out, AttentionState(torch.cat(open_keys), torch.cat(open_values))
