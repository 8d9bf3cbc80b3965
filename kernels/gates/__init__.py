"""Gates: SiLU of one number times another.

SiLU alone has no kernel here: torch's own reads and writes everything once, computes in float32 and
keeps its input alone.
"""

from torch import Tensor

from ..dispatch import use_triton
from .naive import gated_silu_naive, swiglu_naive
from .portable import gated_silu_portable, swiglu_portable

__all__ = ["gated_silu", "gated_silu_naive", "swiglu", "swiglu_naive"]


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, where silu(g) = g / (1 + exp(-g)).

    Args:
        gate: [..., W] of two dimensions or more, any floating type and strides.
        x: Shape and type of gate, any strides.

    Returns:
        The product in their shape and type, contiguous; differentiable (once) in both. It is
        computed in float32, or float64 for float64 inputs; nothing but gate and x is kept for
        backward.

    Raises:
        ValueError: a shape or type does not fit.
    """
    if gate.dim() < 2 or not gate.is_floating_point():
        raise ValueError(
            f"gate is {gate.dtype} of shape {tuple(gate.shape)}; it must be floating, [..., W] of "
            "two dimensions or more."
        )
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be {gate.dtype} of shape "
            f"{tuple(gate.shape)}, as gate is."
        )
    if gate.numel() and use_triton(gate, x):
        from .triton import gated_silu_triton

        return gated_silu_triton(gate, x)
    return gated_silu_portable(gate, x)


def swiglu(hidden: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension.

    Args:
        hidden: [..., 2 F] of two dimensions or more, any floating type and strides.

    Returns:
        [..., F] in hidden's type, contiguous; differentiable (once). It is computed in float32, or
        float64 for float64 hidden; nothing but hidden is kept for backward.

    Raises:
        ValueError: hidden's shape or type does not fit.
    """
    if hidden.dim() < 2 or hidden.shape[-1] % 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} of shape {tuple(hidden.shape)}; it must be floating, "
            "[..., 2 F] of two dimensions or more."
        )
    if hidden.numel() and use_triton(hidden):
        from .triton import swiglu_triton

        return swiglu_triton(hidden)
    return swiglu_portable(hidden)
