"""RMSNorm and LayerNorm over the last dimension, with weights stored as offsets from one.

RMSNorm is what follows CEMA in a block. It is an operator of its own and no part of CEMA's kernels:
those hold a few channels over much time, a norm needs all channels of a step, so a fused kernel
would still have to write CEMA's output before it could read it back. What CEMA adds of its input
(omega x) costs nothing where it is now, on the diagonal of a product that is computed anyway.
"""

from torch import Tensor

from ..dispatch import use_triton
from .naive import layer_norm_naive, rms_norm_naive
from .portable import layer_norm_portable, rms_norm_portable

__all__ = ["layer_norm", "layer_norm_naive", "rms_norm", "rms_norm_naive"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + 1), the mean over the last dimension.

    Args:
        x: [..., D] of two dimensions or more, any floating type and strides.
        weight: [D], stored as an offset from one.
        eps: Added to the mean square.

    Returns:
        The result in x's shape and type, contiguous. It is computed in float32, or float64 for
        float64 x. Differentiable (once) in x and weight; for backward x, as it is, is kept and, in
        Triton, one number a row.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(x, weight=weight)
    rows = _rows(x)
    if x.numel() and use_triton(x):
        from .triton import rms_norm_triton

        return rms_norm_triton(rows, weight, eps).view(x.shape)
    return rms_norm_portable(rows, weight, eps).view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * (weight + 1) + bias, over the last dimension.

    Args:
        x: [..., D] of two dimensions or more, any floating type and strides.
        weight: [D], stored as an offset from one.
        bias: [D].
        eps: Added to the (population) variance.

    Returns:
        The result in x's shape and type, contiguous. It is computed in float32, or float64 for
        float64 x. Differentiable (once) in x, weight and bias; for backward x, as it is, is kept
        and, in Triton, two numbers a row.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(x, weight=weight, bias=bias)
    rows = _rows(x)
    if x.numel() and use_triton(x):
        from .triton import layer_norm_triton

        return layer_norm_triton(rows, weight, bias, eps).view(x.shape)
    return layer_norm_portable(rows, weight, bias, eps).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """x as [A, B, D], as a view where three dimensions can be one."""
    if x.is_contiguous():
        return x.view(-1, 1, x.shape[-1]) if x.numel() else x.reshape(0, 1, x.shape[-1])
    return x.reshape(-1, *x.shape[-2:])


def _check(x: Tensor, **parameters: Tensor) -> None:
    if x.dim() < 2 or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating, [..., D] of two "
            "dimensions or more, with D at least 1."
        )
    for name, parameter in parameters.items():
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; it must be {tuple(x.shape[-1:])}."
            )
