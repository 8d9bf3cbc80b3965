"""RMSNorm and LayerNorm with plain torch operations, for any device.

Both take x as [A, B, D] and keep it as it is for backward, never a copy in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import row_blocks
from ..fuse import fused, fuses, pieces


def rms_norm_portable(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `rms_norm` for x [A, B, D]; nothing is checked here."""
    return _RMSNorm.apply(x, weight, eps)


def layer_norm_portable(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `layer_norm` for x [A, B, D]; nothing is checked here."""
    return _LayerNorm.apply(x, weight, bias, eps)


class _RMSNorm(torch.autograd.Function):
    """Blocks of rows stay in a CPU's cache from one operation to the next."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = _compute_dtype(x)
        gain = weight.to(dtype) + 1
        if fuses(x):
            y, rstd = _rms_norm(x, gain, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(*x.shape[:2], 1, dtype=dtype, device=x.device)
        for rows in _blocks(x):
            block = x[rows].to(dtype)
            norm = torch.linalg.vector_norm(block, dim=-1, keepdim=True, out=rstd[rows])
            norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            if x.dtype == dtype:
                torch.mul(block, norm, out=y[rows]).mul_(gain)
            else:
                y[rows] = (block * norm).mul_(gain)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dtype, channels = rstd.dtype, x.shape[-1]
        gain = weight.to(dtype) + 1
        if fuses(x):
            grad_weight = _weight_sums(x, grad_y, rstd).sum((0, 1), dtype=torch.float64)
            return _rms_norm_gradient(x, grad_y, rstd, gain), grad_weight.to(weight.dtype), None
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(channels, dtype=torch.float64, device=x.device)
        space = None
        for rows in _blocks(x):
            block, grad, inverse = x[rows].to(dtype), grad_y[rows].to(dtype), rstd[rows]
            # One piece of memory for all blocks: it stays in the cache and in the process.
            space = (
                torch.empty(block.shape, dtype=dtype, device=x.device) if space is None else space
            )
            work = space[: len(block)]
            # With n = x rstd, dL/dx = rstd (gain dL/dy - n mean(gain dL/dy n)).
            product = torch.mul(block, grad, out=work).view(-1, channels)
            grad_weight += inverse.view(-1) @ product
            along = (product @ gain).view(inverse.shape).mul_(inverse).mul_(inverse)
            torch.mul(grad, gain, out=work).addcmul_(block, along, value=-1 / channels)
            if x.dtype == dtype:
                torch.mul(work, inverse, out=grad_x[rows])
            else:
                grad_x[rows] = work.mul_(inverse)
        return grad_x, grad_weight.to(weight.dtype), None


@fused
def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.to(gain.dtype)
    rstd = ((values * values).sum(-1, keepdim=True) / x.shape[-1] + eps).rsqrt()
    return (values * rstd * gain).to(x.dtype), rstd


@fused
def _rms_norm_gradient(x: Tensor, grad_y: Tensor, rstd: Tensor, gain: Tensor) -> Tensor:
    """With n = x rstd: rstd (gain dL/dy - n mean(gain dL/dy n))."""
    normed, grad = x.to(gain.dtype) * rstd, grad_y.to(gain.dtype) * gain
    along = (normed * grad).sum(-1, keepdim=True) / x.shape[-1]
    return ((grad - normed * along) * rstd).to(x.dtype)


@fused
def _weight_sums(x: Tensor, grad_y: Tensor, rstd: Tensor) -> Tensor:
    """Sums of dL/dy x rstd over pieces of the rows, [pieces, B, D]."""
    product = grad_y.to(rstd.dtype) * (x.to(rstd.dtype) * rstd)
    return pieces(product, 0).sum(1)


class _LayerNorm(torch.autograd.Function):
    """torch's own kernels, on blocks cast to float32 where x is narrower.

    The CPU's take bfloat16 beside parameters in float32, but backward they would sum the
    parameters' gradients in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = _compute_dtype(x)
        affine = weight.to(dtype) + 1, bias.to(dtype)
        if x.dtype != dtype and fuses(x):
            y, mean, rstd = _layer_norm(x, *affine, eps)
        elif x.dtype == dtype or x.device.type == "cpu":
            y, mean, rstd = torch.native_layer_norm(x, weight.shape, *affine, eps)
        else:
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            mean = torch.empty(*x.shape[:2], 1, dtype=dtype, device=x.device)
            rstd = torch.empty_like(mean)
            for rows in _blocks(x):
                y[rows], mean[rows], rstd[rows] = torch.native_layer_norm(
                    x[rows].to(dtype), weight.shape, *affine, eps
                )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dtype = mean.dtype
        affine = weight.to(dtype) + 1, bias.to(dtype)
        if x.dtype != dtype and fuses(x):
            sums = _affine_sums(x, grad_y, mean, rstd)
            grad_weight, grad_bias = (z.sum((0, 1), dtype=torch.float64) for z in sums)
            grad_x = _layer_norm_gradient(x, grad_y, mean, rstd, affine[0])
            return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None

        def gradients(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten.native_layer_norm_backward(
                *(grad_y[rows].to(dtype), x[rows].to(dtype), weight.shape),
                *(mean[rows], rstd[rows], *affine, [True, True, True]),
            )

        if x.dtype == dtype:
            grad_x, grad_weight, grad_bias = gradients(slice(None))
        else:
            grad_x = torch.empty_like(x)
            grad_weight, grad_bias = torch.zeros(2, x.shape[-1], dtype=dtype, device=x.device)
            for rows in _blocks(x):
                grad_x[rows], *more = gradients(rows)
                grad_weight += more[0]
                grad_bias += more[1]
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


@fused
def _layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    values = x.to(gain.dtype)
    mean = values.sum(-1, keepdim=True) / x.shape[-1]
    centred = values - mean
    rstd = ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps).rsqrt()
    return (centred * rstd * gain + bias).to(x.dtype), mean, rstd


@fused
def _layer_norm_gradient(
    x: Tensor, grad_y: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor
) -> Tensor:
    """With n = (x - mean) rstd and g = gain dL/dy: rstd (g - mean(g) - n mean(g n))."""
    normed, grad = (x.to(gain.dtype) - mean) * rstd, grad_y.to(gain.dtype) * gain
    along = (normed * grad).sum(-1, keepdim=True) / x.shape[-1]
    level = grad.sum(-1, keepdim=True) / x.shape[-1]
    return ((grad - level - normed * along) * rstd).to(x.dtype)


@fused
def _affine_sums(x: Tensor, grad_y: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dL/dy (x - mean) rstd and of dL/dy over pieces of the rows, [pieces, B, D]."""
    grad = grad_y.to(rstd.dtype)
    product = grad * ((x.to(rstd.dtype) - mean) * rstd)
    return pieces(product, 0).sum(1), pieces(grad, 0).sum(1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor):  # noqa: ANN202
    return row_blocks(len(x), x)
