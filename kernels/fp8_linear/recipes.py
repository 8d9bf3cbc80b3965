"""How an FP8 matrix product scales its operands, by the names that Megatron's --fp8-recipe has."""

from typing import NamedTuple


class Fp8Recipe(NamedTuple):
    """The elements that share a scale.

    Block = rows of the operand (the product's own index) by columns (the summed index); None stands
    for the whole tensor. The rows that an operand has differ between the forward and the two
    backward products, and each product's operand is quantized anew from full precision, as
    Transformer Engine does.
    """

    activation_block: tuple[int, int] | None
    """Of activations and gradients."""

    weight_block: tuple[int, int] | None

    power_of_two_scales: bool
    """A scale is the largest power of two that fits; else it makes the largest element fit."""


RECIPES = {
    "tensorwise": Fp8Recipe(None, None, power_of_two_scales=False),
    "blockwise": Fp8Recipe((1, 128), (128, 128), power_of_two_scales=True),
    "mxfp8": Fp8Recipe((1, 32), (1, 32), power_of_two_scales=True),
}
"""Transformer Engine 2.20's Float8CurrentScaling, Float8BlockScaling and MXFP8BlockScaling."""
