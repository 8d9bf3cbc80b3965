"""A linear layer whose three matrix products have FP8 operands, emulated in float32."""

from torch import Tensor

from .naive import fp8_linear_naive
from .portable import Fp8Linear
from .recipes import RECIPES, Fp8Recipe

__all__ = ["RECIPES", "Fp8Recipe", "fp8_linear", "fp8_linear_naive"]


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """x weight^T + bias as FP8 tensor cores compute it, up to the order of their float32 sums.

    x and weight become E4M3 and the upstream gradient E5M2 (Transformer Engine's hybrid format)
    before every product, each scaled as the recipe says; sums are float32, and so is the bias's
    gradient, of the unquantized upstream one. Scales come from the tensor at hand: delayed scaling,
    which takes them from earlier steps, is not emulated.

    Args:
        x: [..., in], float32 or bf16, of any strides.
        weight: [out, in], float32 or bf16.
        bias: [out] or None.
        recipe: tensorwise, blockwise or mxfp8.

    Returns:
        [..., out] in x's type. Gradients have their tensors' types.

    Raises:
        ValueError: the recipe is unknown, or shapes do not fit.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it takes {', '.join(RECIPES)}.")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [..., in] and [out, in]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},).")
    y = Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, RECIPES[recipe])
    return y.view(*x.shape[:-1], -1)
