"""Emulated FP8 products: the formats by definition, scales by block, and every gradient."""

import math

import pytest
import torch
from megalodon_mcore.kernels.fp8_linear import RECIPES, fp8_linear, fp8_linear_naive
from megalodon_mcore.kernels.fp8_linear.naive import E4M3, E5M2, quantize_naive, round_to
from megalodon_mcore.kernels.fp8_linear.portable import quantize_portable

from comparing import seeded

FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def random(*shape, seed=0, dtype=torch.float32):
    """Elements of many magnitudes, so that blocks have different scales."""
    generator = seeded(seed)
    exponents = 6 * torch.randn(shape[0], 1, generator=generator)
    exponents = exponents + 3 * torch.randn(1, shape[1], generator=generator)
    return (torch.randn(shape, generator=generator) * exponents.exp2()).to(dtype)


def relative_error(actual, expected):
    assert actual.isfinite().all()
    return ((actual - expected).norm() / expected.norm()).item()


def test_formats_have_the_published_values():
    # arXiv 2209.05433, table 1.
    assert (len(E4M3), E4M3[1], E4M3[8], E4M3[-1]) == (127, 2**-9, 2**-6, 448)
    assert (len(E5M2), E5M2[1], E5M2[4], E5M2[-1]) == (124, 2**-16, 2**-14, 57344)


@pytest.mark.parametrize("dtype", FORMATS, ids=["E4M3", "E5M2"])
def test_the_cast_rounds_to_nearest_even(dtype):
    values = FORMATS[dtype]
    middles = [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
    points = [*values, *middles, *(math.nextafter(middle, 0) for middle in middles)]
    points = torch.tensor([*points, *(-point for point in points)])
    expected = torch.tensor([round_to(point, values) for point in points.tolist()])
    assert torch.equal(points.to(dtype).float(), expected)


@pytest.mark.parametrize("dtype", FORMATS, ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("block", [None, (1, 4), (4, 4), (1, 32)])
@pytest.mark.parametrize("powers", [False, True], ids=["any scale", "powers of two"])
def test_quantization_is_the_oracles(dtype, block, powers):
    x = random(7, 37)
    x[2, 8:] = 0.0
    actual = quantize_portable(x, dtype, block, powers)
    expected = quantize_naive(x, FORMATS[dtype], block, powers)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0.0)


def test_powers_of_two_are_the_largest_that_fit():
    """Scales of blocks whose largest element lies on either side of what E4M3 has room for."""
    for largest in (448.0, math.nextafter(448.0, 512), 1.75, 1.7500001, 2.0**-100, 3e38):
        x = torch.tensor([[largest, largest / 16]])
        quantized = quantize_portable(x, torch.float8_e4m3fn, None, True)
        expected = quantize_naive(x, E4M3, None, True)
        torch.testing.assert_close(quantized.double(), expected, rtol=1e-6, atol=0.0)


def test_zeros_stay_and_what_is_not_finite_stays_visible():
    x = torch.zeros(2, 256)
    assert torch.equal(quantize_portable(x, torch.float8_e4m3fn, (1, 128), True), x)
    x[0, 3] = math.nan
    x[1, 200] = math.inf
    spread = quantize_portable(x, torch.float8_e4m3fn, (1, 128), True)
    assert spread[0, :128].isnan().all() and spread[1, 128:].isnan().all()
    assert torch.equal(spread[0, 128:], x[0, 128:]) and torch.equal(spread[1, :128], x[1, :128])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", [(5, 40, 33), (130, 3, 140)], ids=["small", "over a block"])
def test_output_and_every_gradient_are_the_oracles(recipe, sizes):
    tokens, inputs, outputs = sizes
    x, weight = random(tokens, inputs, seed=1), random(outputs, inputs, seed=2)
    bias, grad = random(1, outputs, seed=3)[0], random(tokens, outputs, seed=4)
    expected = fp8_linear_naive(x, weight, bias, grad, RECIPES[recipe])
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = fp8_linear(x, weight, bias, recipe)
    y.backward(grad)
    actual = (y.detach(), *(leaf.grad for leaf in leaves))
    for name, a, e in zip(("y", "x", "weight", "bias"), actual, expected, strict=True):
        assert relative_error(a, e) < 1e-6, name
    # The quantization itself is far larger than what the comparison lets pass.
    assert relative_error(y.detach(), x.detach().double() @ weight.detach().double().T) > 1e-3


def test_leading_dimensions_types_and_strides():
    weight = random(16, 24, dtype=torch.bfloat16).requires_grad_()
    x = random(24, 30, seed=1, dtype=torch.bfloat16).T.unflatten(0, (5, 6)).requires_grad_()
    y = fp8_linear(x, weight, None, "blockwise")
    assert y.shape == (5, 6, 16) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == weight.grad.dtype == torch.bfloat16
    flat = fp8_linear(x.flatten(0, 1).float(), weight.float(), None, "blockwise")
    assert torch.equal(y.flatten(0, 1), flat.to(torch.bfloat16))


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="recipe is 'delayed'; it takes tensorwise, blockwise"):
        fp8_linear(x, weight, None, "delayed")
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\) and weight \(4, 2\)"):
        fp8_linear(x, torch.ones(4, 2), None, "tensorwise")
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); it must be \(4,\)"):
        fp8_linear(x, weight, torch.ones(3), "tensorwise")
