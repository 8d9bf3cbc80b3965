"""Rotary position embedding with positions that restart at every chunk."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rotary(x: Tensor, base: float, offset: int, chunk_size: int) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by the angle position * base^(-2i/d).

    The position of step t is (offset + t) mod chunk_size (arXiv 2104.09864, equation 15, on
    adjacent pairs as in the released Megalodon source).

    Args:
        x: [batch, length, heads, d] with d even, any floating type and strides.
        base: Base of the geometric series of frequencies.
        offset: How many steps came before x in its sequence.
        chunk_size: Positions in a chunk.

    Returns:
        The rotated x, in its type; computed in float32, or float64 for float64 inputs.

    Raises:
        ValueError: x's shape or type, base, offset or chunk_size does not fit.
    """
    if x.dim() != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; "
            "it must be floating, [batch, length, heads, d] with d even."
        )
    if base <= 0:
        raise ValueError(f"base is {base}; it must be positive.")
    if offset < 0:
        raise ValueError(f"offset is {offset}; it must be at least 0.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")

    d = x.shape[-1]
    dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    turns = _turns(chunk_size, d, float(base), x.device, dtype)
    return _Rotation.apply(x, turns, offset % chunk_size)


class _Rotation(torch.autograd.Function):
    """The backward pass turns the gradient the other way; it saves nothing of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, first: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(turns)
        ctx.first = first
        return _turn(x, turns, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (turns,) = ctx.saved_tensors
        return _turn(grad, turns.conj(), ctx.first), None, None


def _turn(x: Tensor, turns: Tensor, first: int) -> Tensor:
    """Turns step t by row (first + t) mod chunk size of `turns` [chunk size, d/2]."""
    chunk_size, length = len(turns), x.shape[1]
    if first + length <= chunk_size:
        turns = turns[first : first + length]
    else:
        turns = turns[torch.arange(first, first + length, device=x.device) % chunk_size]
    # A copy, whose strides and offset view_as_complex takes whatever x's are.
    wide = torch.empty(x.shape, dtype=turns.real.dtype, device=x.device).copy_(x)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turns[:, None])
    return wide.to(x.dtype)


@lru_cache(maxsize=16)
def _turns(
    chunk_size: int, d: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """exp(i position base^(-2i/d)) as [chunk_size, d/2], from angles in float64."""
    # A cached inference tensor would be refused by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        frequency = base ** -(torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
        position = torch.arange(chunk_size, dtype=torch.float64, device=device)
        angle = torch.outer(position, frequency)
        return torch.polar(torch.ones_like(angle), angle).to(dtype)
