"""The state of chunked attention between segments of a document."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..segments import Segments


class AttentionState(NamedTuple):
    """Keys and values of the chunks that segments are inside of; see `chunked_attention`."""

    key: Tensor
    value: Tensor


def open_chunks(
    k: Tensor, v: Tensor, chunk_size: int, segments: Segments, state: AttentionState | None
) -> AttentionState:
    """The state after segments: copies, since a slice would keep the whole of k and v alive."""

    def held(steps: Tensor, before: Tensor | None) -> Tensor:
        if segments.whole_rows:
            return _of_whole_rows(steps, chunk_size, segments, before)
        parts, used = [steps.new_empty(0, *steps.shape[2:])], 0
        for segment in segments:
            begun = segment.position % chunk_size
            count = (segment.position + segment.length) % chunk_size
            if count > segment.length:
                parts.append(before[used : used + begun])
            own = min(count, segment.length)
            stop = segment.start + segment.length
            parts.append(steps[stop - own : stop, segment.row])
            used += begun
        return torch.cat(parts)

    before = state or AttentionState(None, None)
    return AttentionState(held(k, before.key), held(v, before.value))


def _of_whole_rows(
    steps: Tensor, chunk_size: int, segments: Segments, before: Tensor | None
) -> Tensor:
    """The same of all rows at once."""
    position = segments[0].position if len(segments) else 0
    begun, count = position % chunk_size, (position + segments.length) % chunk_size
    parts = [steps[max(0, segments.length - count) :].transpose(0, 1)]
    if count > segments.length:
        parts.insert(0, before.unflatten(0, (segments.batch, begun)))
    return torch.cat(parts, dim=1).flatten(0, 1)
