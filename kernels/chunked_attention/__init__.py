"""Causal softmax attention inside chunks, with a state that carries a partly filled chunk."""

from torch import Tensor

from ..dispatch import use_triton
from .naive import chunked_attention_naive
from .portable import chunked_attention_portable
from .state import AttentionState

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
    state: AttentionState | None = None,
    dropout_p: float = 0.0,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Exact causal attention inside each chunk of `chunk_size` positions; nothing crosses chunks.

    For a position t whose chunk starts at c (arXiv 2404.08801, section 3.3; Megalodon normalises
    its queries and keys, so the logits get no scale):

        out_t = sum_{s=c..t} softmax_s(q_t . k_s) v_s

    Args:
        q: [batch, length, heads, dk], of any length, floating type and strides.
        k: Like q.
        v: [batch, length, heads, dv], of the same type.
        chunk_size: Positions in a chunk.
        state: Keys [batch, m, heads, dk] and values [batch, m, heads, dv] of the chunk the
            sequence starts in, 0 <= m < chunk_size. None means the start of a chunk.
        dropout_p: Probability of dropping a softmax weight; drawn from torch's generator of the
            device, so the same generator state gives the same mask.
        return_state: Whether to return the state after the last position.

    Returns:
        out [batch, length, heads, dv] in v's type, and the new state (None unless asked for),
        which holds copies. The softmax is computed in float32, or float64 for float64 inputs.
        Differentiable in q, k, v and the state, through both results.

    Raises:
        ValueError: a shape, a type, chunk_size or dropout_p does not fit.
    """
    _check(q, k, v, chunk_size, state, dropout_p)
    if use_triton(q, k, v):
        from .triton import chunked_attention_triton

        return chunked_attention_triton(q, k, v, chunk_size, state, dropout_p, return_state)
    return chunked_attention_portable(q, k, v, chunk_size, state, dropout_p, return_state)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    state: AttentionState | None,
    dropout_p: float,
) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(
            f"q is {q.dtype} of shape {tuple(q.shape)}; "
            "it must be floating, [batch, length, heads, dk]."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1.")
    batch, length, heads, dk = q.shape
    tensors = {"k": (k, length, dk), "v": (v, length, v.shape[-1])}
    if state is not None:
        cached = state.key.shape[1] if state.key.dim() == 4 else 0
        if cached >= chunk_size:
            raise ValueError(f"state.key holds {cached} positions; it must be below {chunk_size}.")
        tensors["state.key"] = (state.key, cached, dk)
        tensors["state.value"] = (state.value, cached, v.shape[-1])
    for name, (tensor, positions, width) in tensors.items():
        expected = (batch, positions, heads, width)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {q.dtype} like q.")
