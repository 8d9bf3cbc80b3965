"""Attention of one query a request over the chunk it is in, whose keys and values lie in pages.

Decoding's operator: nothing is copied, and nothing on the host depends on where requests are.
"""

from torch import Tensor

from ..dispatch import use_triton
from .naive import paged_attention_naive
from .portable import paged_attention_portable

__all__ = ["paged_attention", "paged_attention_naive", "paged_attention_portable"]


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, room: int | None = None
) -> Tensor:
    """Attention of each request's query over the slots of its page that are filled.

    With n = filled[r] and p = pages[r] (arXiv 2404.08801, section 3.3; the logits get no scale):

        out_r = sum_{s<n} softmax_s(q_r . keys[p, :, s]) values[p, :, s]

    Args:
        q: [R, heads, dk], any floating type.
        keys: [pages, heads, slots, dk] of the same type and any strides.
        values: [pages, heads, slots, dv], likewise.
        pages: int64 [R]; requests may share one.
        filled: int64 [R], 1 to `slots`; what the other slots hold is not looked at.
        room: No request has filled more slots; None for all of them.

    Returns:
        [R, heads, dv] in the same type; the softmax is computed in float32, or float64 for float64.
        Not differentiable.

    Raises:
        ValueError: a shape, a type or room does not fit.
    """
    room = _check(q, keys, values, pages, filled, room)
    beside = min(z.stride(-1) for z in (q, keys, values)) == 1
    if q.numel() and beside and use_triton(q, keys, values):
        from .triton import paged_attention_triton as attention
    else:
        attention = paged_attention_portable
    return attention(q, keys, values, pages, filled, room)


def _check(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, filled: Tensor, room: int | None
) -> int:
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [requests, heads, dk].")
    if keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != q.shape[1:]:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)}; it must be [pages, heads, slots, dk], with "
            f"{tuple(q.shape[1:])} heads and dk as q."
        )
    if values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be {(*keys.shape[:3], 'dv')}, as "
            "keys are."
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {q.dtype} like q.")
    for name, tensor in (("pages", pages), ("filled", filled)):
        if tuple(tensor.shape) != (len(q),) or tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be an integer "
                f"for each of {len(q)} requests."
            )
    slots = keys.shape[2]
    if room is not None and not 1 <= room <= slots:
        raise ValueError(f"room is {room}; it must be 1 to {slots}, the slots of a page.")
    return slots if room is None else room
