"""Chunked attention of one position, in as few calls as it takes: for decoding.

The keys and values of a chunk are written one after the other into room for all of them, which
the states along the way share: each is the part that was filled when it was made. What is filled
is never written again, so a state stays what it was. Where a second sequence goes on from a state
behind which the room is taken, it gets room of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .naive import AttentionState


class _Room:
    """Memory for the keys and values of a chunk.

    key and value are [batch, chunk, heads, d] and, with the same memory, keys and values
    [batch * heads, chunk, d].
    """

    def __init__(self, state: AttentionState, chunk_size: int) -> None:
        self.key, self.keys = _room_of(state.key, chunk_size)
        self.value, self.values = _room_of(state.value, chunk_size)
        self.filled = state.key.shape[1]


def _room_of(part: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    batch, filled, heads, width = part.shape
    # Outside inference mode an inference tensor could not be written to.
    with torch.inference_mode(False):
        by_head = part.new_empty(batch * heads, chunk_size, width)
    by_position = by_head.view(batch, heads, chunk_size, width).transpose(1, 2)
    by_position[:, :filled] = part
    return by_position, by_head


class _StateInRoom(AttentionState):
    """An AttentionState whose tensors are views of room; its copies are plain ones."""

    room: _Room | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionState, tuple(self)


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, state: AttentionState
) -> tuple[Tensor, AttentionState]:
    """What `chunked_attention` makes of a single position, for any device; nothing is checked.

    Args:
        q: [batch, heads, dk].
        k: Like q.
        v: [batch, heads, dv], of the same type.
        chunk_size: Positions in a chunk.
        state: As `chunked_attention` takes it; of no positions at the start of a chunk.

    Returns:
        out [batch, heads, dv] in v's type, and the new state; `state` itself stays as it was.
        Not differentiable.
    """
    position = state.key.shape[1]
    room = getattr(state, "room", None)
    if room is None or room.filled != position:
        room = _Room(state, chunk_size)
    room.key.select(1, position).copy_(k)
    room.value.select(1, position).copy_(v)
    room.filled = filled = position + 1
    keys, rows = room.keys.narrow(1, 0, filled), q.reshape(-1, 1, q.shape[2])
    if q.dtype not in (torch.float32, torch.float64):
        rows, keys = rows.float(), keys.float()
    weights = torch.bmm(rows, keys.mT).softmax(-1)
    if weights.dtype != v.dtype:
        weights = weights.to(v.dtype)
    out = torch.bmm(weights, room.values.narrow(1, 0, filled)).view(v.shape)
    if filled == chunk_size:
        # Empty, and without the room that it would keep alive.
        return out, AttentionState(*(z.new_empty(len(z), 0, *z.shape[1:]) for z in (k, v)))
    state = _StateInRoom(room.key.narrow(1, 0, filled), room.value.narrow(1, 0, filled))
    state.room = room
    return out, state
