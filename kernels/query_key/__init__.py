"""Queries and keys from the shared representation z: normalized, scaled, shifted and rotated."""

from torch import Tensor

from ..dispatch import use_triton
from .naive import query_key_naive
from .portable import query_key_portable

__all__ = ["query_key", "query_key_naive"]


def query_key(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    base: float,
    offset: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """q and k of every position and head (arXiv 2404.08801, section 3.3, as released).

    With n = z / sqrt(mean(z^2) + eps) of each head, q uses row 0 of weight and bias, k row 1:

        q = rotate(n (weight + 1) / sqrt(width) + bias)

    Rotation turns each pair (x[2j], x[2j+1]) by position * base^(-2j/width), where the position of
    step t is (offset + t) mod chunk_size: positions restart at every chunk.

    Args:
        z: [batch, length, heads, width] with width even, any floating type and strides.
        weight: [2, heads * width], stored as an offset from one.
        bias: [2, heads * width].
        eps: Added to the mean square.
        base: Base of the geometric series of frequencies.
        offset: How many steps came before z in its sequence.
        chunk_size: Positions in a chunk.

    Returns:
        q and k in z's shape and type, contiguous; computed in float32, or float64 for float64 z.
        Differentiable (once) in z, weight and bias. Of tensors of z's size only z is kept for
        backward.

    Raises:
        ValueError: a shape or type, base, offset or chunk_size does not fit.
    """
    _check(z, weight, bias, base, offset, chunk_size)
    if z.numel() and use_triton(z):
        from .triton import query_key_triton

        return query_key_triton(z, weight, bias, eps, base, offset, chunk_size)
    return query_key_portable(z, weight, bias, eps, base, offset, chunk_size)


def _check(
    z: Tensor, weight: Tensor, bias: Tensor, base: float, offset: int, chunk_size: int
) -> None:
    if z.dim() != 4 or z.shape[-1] % 2 or not z.shape[-1] or not z.is_floating_point():
        raise ValueError(
            f"z is {z.dtype} of shape {tuple(z.shape)}; it must be floating, "
            "[batch, length, heads, width] with an even width."
        )
    expected = (2, z.shape[2] * z.shape[3])
    for name, parameter in (("weight", weight), ("bias", bias)):
        if tuple(parameter.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must be {expected}.")
    if base <= 0:
        raise ValueError(f"base is {base}; it must be positive.")
    if offset < 0:
        raise ValueError(f"offset is {offset}; it must be at least 0.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
