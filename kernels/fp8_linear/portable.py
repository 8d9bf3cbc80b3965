"""FP8 linear layers by casting to FP8 and back: the numerics, not the speed, on any device."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .recipes import Fp8Recipe


def quantize_portable(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int] | None, power_of_two_scales: bool
) -> Tensor:
    """[rows, columns] after quantization with a scale per block; float32.

    Blocks at the edges may be smaller. Blocks of zeros stay; one with an infinity or NaN
    becomes NaN.
    """
    rows, columns = x.shape
    height, width = block or x.shape
    blocks = F.pad(x.float(), (0, -columns % width, 0, -rows % height))
    blocks = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.finfo(dtype).max / largest
    scale = torch.where(scale.isinf(), 1.0, scale)
    if power_of_two_scales:
        # frexp gives a mantissa in [0.5, 1), exactly; log2 would round.
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    # Casts differ in what they make of an infinity; here its whole block shows it.
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    blocks = (blocks * scale).to(dtype).float() / scale
    return blocks.flatten(2, 3).flatten(0, 1)[:rows, :columns]


class Fp8Linear(torch.autograd.Function):
    """y = Q(x) Q(W)^T + b; both backward products quantize their operands along their own sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Fp8Recipe,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = F.linear(
            _activation(x, recipe), _weight(weight, recipe), None if bias is None else bias.float()
        )
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe = ctx.recipe
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _gradient(grad, recipe) @ _weight(weight.T, recipe).T
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _gradient(grad.T, recipe) @ _activation(x.T, recipe).T
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _activation(x: Tensor, recipe: Fp8Recipe) -> Tensor:
    return quantize_portable(
        x, torch.float8_e4m3fn, recipe.activation_block, recipe.power_of_two_scales
    )


def _weight(weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    return quantize_portable(
        weight, torch.float8_e4m3fn, recipe.weight_block, recipe.power_of_two_scales
    )


def _gradient(grad: Tensor, recipe: Fp8Recipe) -> Tensor:
    return quantize_portable(
        grad, torch.float8_e5m2, recipe.activation_block, recipe.power_of_two_scales
    )
