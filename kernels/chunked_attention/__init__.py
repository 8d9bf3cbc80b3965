"""Causal softmax attention inside chunks, with a state that carries a partly filled chunk."""

from torch import Tensor

from ..dispatch import use_triton
from ..segments import Segments, checked_segments
from .naive import chunked_attention_naive
from .portable import chunked_attention_portable
from .state import AttentionState, open_chunks

__all__ = [
    "AttentionState",
    "chunked_attention",
    "chunked_attention_naive",
    "chunked_attention_portable",
]


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    segments: Segments | None = None,
    state: AttentionState | None = None,
    dropout_p: float = 0.0,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Exact causal attention inside each chunk of `chunk_size` positions of a document.

    For a position t whose chunk starts at c (arXiv 2404.08801, section 3.3; Megalodon normalises
    its queries and keys, so the logits get no scale):

        out_t = sum_{s=c..t} softmax_s(q_t . k_s) v_s

    Args:
        q: [length, batch, heads, dk], of any length, floating type and strides.
        k: Like q.
        v: [length, batch, heads, dv], of the same type.
        chunk_size: Positions in a chunk; chunks count from the start of each document.
        segments: Which documents the steps belong to; None: each row is the start of one.
        state: Keys [M, heads, dk] and values [M, heads, dv] of the chunks that segments start
            inside of: for each segment, in their order, those of position % chunk_size positions.
            None where M is 0.
        dropout_p: Probability of dropping a softmax weight; drawn from torch's generator of the
            device, so the same generator state gives the same mask.
        return_state: Whether to return the state after the segments.

    Returns:
        out [length, batch, heads, dv] in v's type, and the new state (None unless asked for),
        which holds copies. The softmax is computed in float32, or float64 for float64 inputs.
        Differentiable in q, k, v and the state, through both results.

    Raises:
        ValueError: a shape, a type, chunk_size or dropout_p does not fit.
    """
    segments = checked_segments(q, segments)
    _check(q, k, v, chunk_size, segments, state, dropout_p)
    if q.numel() and use_triton(q, k, v):
        from .triton import chunked_attention_triton as attention
    else:
        attention = chunked_attention_portable
    out = attention(q, k, v, chunk_size, segments, state, dropout_p)
    return out, open_chunks(k, v, chunk_size, segments, state) if return_state else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    segments: Segments,
    state: AttentionState | None,
    dropout_p: float,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [length, batch, heads, dk].")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1.")
    heads, dk = q.shape[2:]
    tensors: dict[str, tuple[Tensor, tuple[int, ...], int]] = {
        "k": (k, q.shape[:2], dk),
        "v": (v, q.shape[:2], v.shape[-1]),
    }
    begun = segments.begun(chunk_size)
    if state is not None:
        tensors["state.key"] = (state.key, (begun,), dk)
        tensors["state.value"] = (state.value, (begun,), v.shape[-1])
    elif begun:
        raise ValueError(f"segments start inside chunks; they need a state of {begun} positions.")
    for name, (tensor, positions, width) in tensors.items():
        expected = (*positions, heads, width)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {q.dtype} like q.")
