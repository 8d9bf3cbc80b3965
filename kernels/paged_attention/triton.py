"""Attention over pages in Triton: reads each filled slot once, where it lies.

There are few requests and heads, so a request's slots are shared by programs, each of which leaves
its own softmax's maximum and sum and its part of the output, in float32, to be put together by a
second kernel. Programs past what a request has filled end at once: so a launch has the same grid
wherever requests are, and fits a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import kernel, on_device_of

LOG2_E = tl.constexpr(1.4426950408889634)
# Slots of a program, and the columns of values that it takes at a time.
SLOTS = 64
WIDTH = 128


def paged_attention_triton(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, room: int
) -> Tensor:
    """Same arguments and result as `paged_attention`; nothing is checked here."""
    requests, heads, dk = q.shape
    dv, splits = values.shape[-1], triton.cdiv(room, SLOTS)
    out = q.new_empty(requests, heads, dv)
    parts = torch.empty(requests, heads, splits, dv, dtype=torch.float32, device=q.device)
    # The maximum, in powers of 2, and the sum of a program's weights.
    scales = parts.new_empty(2, requests, heads, splits)
    width = min(WIDTH, triton.next_power_of_2(dv))
    constants = {"HEADS": heads, "SPLITS": splits, "DV": dv, "SLOTS": SLOTS, "WIDTH": width}
    with on_device_of(q):
        split_kernel[(requests * heads * splits,)](
            *(q, keys, values, pages, filled, parts, scales, scales.stride(0)),
            *(*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
            DK=dk,
            KEY_WIDTH=triton.next_power_of_2(dk),
            **constants,
            num_warps=8,
        )
        join_kernel[(requests * heads * triton.cdiv(dv, width),)](
            *(filled, parts, scales, scales.stride(0), out), **constants, num_warps=4
        )
    return out


@kernel
def split_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
    filled_ptr,
    parts_ptr,
    scales_ptr,
    scale_stride,
    q_request,
    q_head,
    key_page,
    key_head,
    key_slot,
    value_page,
    value_head,
    value_slot,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Of some slots of a request's head: their softmax, and with it the sum of their values."""
    program = tl.program_id(0).to(tl.int64)
    split = program % SPLITS
    head = program // SPLITS % HEADS
    request = program // (SPLITS * HEADS)
    filled = tl.load(filled_ptr + request)
    if split * SLOTS < filled:
        page = tl.load(pages_ptr + request).to(tl.int64)
        slot = split * SLOTS + tl.arange(0, SLOTS)
        there = (slot < filled)[:, None]
        key_column = tl.arange(0, KEY_WIDTH)
        in_key = key_column < DK
        q = tl.load(
            q_ptr + request * q_request + head * q_head + key_column, mask=in_key, other=0.0
        )
        at = (
            keys_ptr
            + page * key_page
            + head * key_head
            + slot[:, None] * key_slot
            + key_column[None]
        )
        keys = tl.load(at, mask=there & in_key[None], other=0.0)
        scores = tl.sum(keys.to(tl.float32) * q.to(tl.float32)[None], axis=1) * LOG2_E
        scores = tl.where(slot < filled, scores, float("-inf"))
        most = tl.max(scores, axis=0)
        weights = tl.exp2(scores - most)
        tl.store(scales_ptr + program, most)
        tl.store(scales_ptr + scale_stride + program, tl.sum(weights, axis=0))
        first = values_ptr + page * value_page + head * value_head + slot[:, None] * value_slot
        for start in range(0, DV, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < DV
            values = tl.load(first + column[None], mask=there & inside[None], other=0.0)
            part = tl.sum(values.to(tl.float32) * weights[:, None], axis=0)
            tl.store(parts_ptr + program * DV + column, part, mask=inside)


@kernel
def join_kernel(
    filled_ptr,
    parts_ptr,
    scales_ptr,
    scale_stride,
    out_ptr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Some columns of a head's output, of what the programs before have left."""
    across: tl.constexpr = (DV + WIDTH - 1) // WIDTH
    program = tl.program_id(0).to(tl.int64)
    row = program // across
    column = (program % across) * WIDTH + tl.arange(0, WIDTH)
    inside = column < DV
    filled = tl.load(filled_ptr + row // HEADS)
    most = float("-inf")
    total = 0.0
    out = tl.zeros([WIDTH], dtype=tl.float32)
    for split in range(0, tl.cdiv(filled, SLOTS)):
        at = row * SPLITS + split
        here = tl.load(scales_ptr + at)
        both = tl.maximum(most, here)
        old = tl.exp2(most - both)
        new = tl.exp2(here - both)
        total = total * old + tl.load(scales_ptr + scale_stride + at) * new
        part = tl.load(parts_ptr + at * DV + column, mask=inside, other=0.0)
        out = out * old + part * new
        most = both
    tl.store(out_ptr + row * DV + column, (out / total).to(out_ptr.dtype.element_ty), mask=inside)
