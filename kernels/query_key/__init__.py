"""Queries and keys from the shared representation z: normalized, scaled, shifted and rotated."""

from torch import Tensor

from ..dispatch import use_triton
from ..segments import Segments, checked_segments
from .naive import query_key_naive
from .portable import query_key_portable

__all__ = ["query_key", "query_key_naive"]


def query_key(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    chunk_size: int,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k of every position and head (arXiv 2404.08801, section 3.3, as released).

    With n = z / sqrt(mean(z^2) + eps) of each head, q uses row 0 of weight and bias, k row 1:

        q = rotate(n (weight + 1) / sqrt(width) + bias)

    Rotation turns each pair (x[2j], x[2j+1]) by position * base^(-2j/width), where the position is
    that in the document mod chunk_size: positions restart at every chunk.

    Args:
        z: [length, batch, heads, width] with width even, any floating type and strides.
        weight: [2, heads * width], stored as an offset from one.
        bias: [2, heads * width].
        eps: Added to the mean square.
        base: Base of the geometric series of frequencies.
        chunk_size: Positions in a chunk.
        segments: Which documents z's steps belong to; None: each row is the start of one.

    Returns:
        q and k in z's shape and type, contiguous; computed in float32, or float64 for float64 z.
        Differentiable (once) in z, weight and bias. Of tensors of z's size only z is kept for
        backward.

    Raises:
        ValueError: a shape or type, base or chunk_size does not fit.
    """
    _check(z, weight, bias, base, chunk_size)
    segments = checked_segments(z, segments)
    if z.numel() and use_triton(z):
        from .triton import query_key_triton

        return query_key_triton(z, weight, bias, eps, base, chunk_size, segments)
    return query_key_portable(z, weight, bias, eps, base, chunk_size, segments)


def _check(z: Tensor, weight: Tensor, bias: Tensor, base: float, chunk_size: int) -> None:
    if z.dim() != 4 or z.shape[-1] % 2 or not z.shape[-1] or not z.is_floating_point():
        raise ValueError(
            f"z is {z.dtype} of shape {tuple(z.shape)}; it must be floating, "
            "[length, batch, heads, width] with an even width."
        )
    expected = (2, z.shape[2] * z.shape[3])
    for name, parameter in (("weight", weight), ("bias", bias)):
        if tuple(parameter.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must be {expected}.")
    if base <= 0:
        raise ValueError(f"base is {base}; it must be positive.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
