"""FP8 linear layers in float64, one block and one element at a time: the oracle of the fast path.

It knows E4M3 and E5M2 by their definition (arXiv 2209.05433, table 1), not by a cast.
"""

import bisect
import math

import torch
from torch import Tensor

from .recipes import Fp8Recipe


def fp8_values(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """Every finite value that is not negative, in ascending order, so that its index is its code.

    `largest` cuts off what the format spends on infinities and NaN.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                values.append(fraction * 2.0 ** (1 - bias))
            else:
                values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return [value for value in values if value <= largest]


E4M3 = fp8_values(4, 3, 448.0)
E5M2 = fp8_values(5, 2, 57344.0)


def round_to(x: float, values: list[float]) -> float:
    """The nearest of a format's values; of two equally near, the one with an even code."""
    above = min(bisect.bisect_left(values, abs(x)), len(values) - 1)
    below = max(above - 1, 0)
    near = min((below, above), key=lambda code: (abs(values[code] - abs(x)), code % 2))
    return math.copysign(values[near], x)


def quantize_naive(
    x: Tensor, values: list[float], block: tuple[int, int] | None, power_of_two_scales: bool
) -> Tensor:
    """[rows, columns] after quantization with a scale per block; float64."""
    rows, columns = block or x.shape
    result = torch.empty(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            part = x[top : top + rows, left : left + columns].double()
            largest = part.abs().max().item()
            scale = values[-1] / largest if largest else 1.0
            if power_of_two_scales:
                scale = 2.0 ** math.floor(math.log2(scale))
            rounded = [round_to(element * scale, values) / scale for element in part.flatten()]
            result[top : top + rows, left : left + columns] = torch.tensor(
                rounded, dtype=torch.float64
            ).view(part.shape)
    return result


def fp8_linear_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, recipe: Fp8Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the gradients of x, weight and bias for an upstream gradient; float64.

    x [tokens, in], weight [out, in], grad [tokens, out].
    """

    def product(
        a: Tensor,
        a_values: list[float],
        b: Tensor,
        b_values: list[float],
        b_block: tuple[int, int] | None,
    ) -> Tensor:
        powers = recipe.power_of_two_scales
        left = quantize_naive(a, a_values, recipe.activation_block, powers)
        return left @ quantize_naive(b, b_values, b_block, powers).T

    y = product(x, E4M3, weight, E4M3, recipe.weight_block)
    if bias is not None:
        y = y + bias.double()
    grad_x = product(grad, E5M2, weight.T, E4M3, recipe.weight_block)
    grad_weight = product(grad.T, E5M2, x.T, E4M3, recipe.activation_block)
    return y, grad_x, grad_weight, grad.double().sum(0)
