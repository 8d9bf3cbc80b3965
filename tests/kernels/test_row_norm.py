"""rms_norm and layer_norm against their float64 oracles, portable and in Triton's interpreter."""

from itertools import product

import pytest
import torch
from megalodon_mcore.kernels.row_norm import (
    layer_norm,
    layer_norm_naive,
    rms_norm,
    rms_norm_naive,
)

from comparing import BFLOAT16, error, poisoned, seeded

# What the `path` fixture cuts small.
PACKAGE, TILES = "row_norm", {"TILE": 1024, "PROGRAMS": 3}
EPS = 1e-5
FLOAT32 = 1e-6
# In a row of few numbers the terms of x's gradient cancel: of 3,000 draws of (1, 5) LayerNorm's
# was off by 2.6e-6 at most.
FEW = 4e-6
FAST = {"rms": rms_norm, "layer": layer_norm}
NAIVE = {"rms": rms_norm_naive, "layer": layer_norm_naive}
SHAPES = [(1, 5), (3, 17), (2, 40, 96), (3, 2, 5, 7), (50, 6), (3, 1, 1000)]


def inputs(name, shape, dtype=torch.float32, transposed=False, offset=1.0):
    x = torch.randn(shape) * 2 + offset
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    parameters = [torch.randn(shape[-1]) / 2 for _ in range(1 if name == "rms" else 2)]
    return [x.to(dtype), *parameters]


def run(function, leaves, dtype=None):
    """The output, then gradients of x and the parameters."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    y = function(*leaves, EPS)
    generator = seeded(0)
    # Exact in every type, so that all see the same gradient of y.
    draw = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw)]


def compare(name, leaves, tolerance):
    actual = run(FAST[name], leaves)
    wanted = run(NAIVE[name], leaves, torch.float64)
    for a, w, leaf in zip(actual, wanted, [leaves[0], *leaves], strict=True):
        assert a.dtype == leaf.dtype
        assert error(a, w) < tolerance
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("name", FAST)
def test_matches_the_oracle(path, name):
    torch.manual_seed(0)
    for shape, transposed in product(SHAPES, (False, True)):
        tolerance = FEW if shape[-1] < 8 else FLOAT32
        compare(name, inputs(name, shape, transposed=transposed), tolerance)


@pytest.mark.parametrize("name", FAST)
def test_bfloat16(path, name):
    torch.manual_seed(0)
    leaves = inputs(name, (5, 9, 40), torch.bfloat16, transposed=True)
    y, grad_x, *parameters = run(FAST[name], leaves)
    wanted_y, wanted_x, *wanted = run(NAIVE[name], leaves, torch.float64)
    for a, w in ((y, wanted_y), (grad_x, wanted_x)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), w, rtol=BFLOAT16, atol=1e-5)
    for a, w in zip(parameters, wanted, strict=True):
        assert a.dtype == torch.float32 and error(a, w) < FLOAT32


@pytest.mark.parametrize("name", FAST)
def test_one_number_a_row(path, name):
    """It is its own norm (its own mean): nothing but rounding is left of the gradient."""
    torch.manual_seed(0)
    leaves = inputs(name, (7, 1))
    for a, w in zip(run(FAST[name], leaves), run(NAIVE[name], leaves, torch.float64), strict=True):
        # Terms of size 1/sqrt(EPS) cancel.
        torch.testing.assert_close(a.double(), w, rtol=1e-5, atol=2**-22 / EPS**0.5)


@pytest.mark.parametrize("name", FAST)
def test_large_mean(path, name):
    torch.manual_seed(0)
    leaves = inputs(name, (6, 64), offset=1000.0)
    y = FAST[name](*leaves, EPS)
    # float32 x is known to 2^-25 of its size, so y of LayerNorm to that times 1000.
    assert error(y, NAIVE[name](*leaves, EPS)) < (FLOAT32 if name == "rms" else 1e-4)


@pytest.mark.parametrize("name", FAST)
def test_no_uninitialised_memory_is_read_and_twice_gives_the_same(path, name):
    torch.manual_seed(0)
    leaves = inputs(name, (40, 3, 24), transposed=True)
    with poisoned():
        for a, b in zip(run(FAST[name], leaves), run(FAST[name], leaves), strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("name", FAST)
def test_a_gradient_of_any_strides(path, name):
    leaves = [leaf.requires_grad_() for leaf in inputs(name, (4, 5, 6))]
    for y, w in (
        (FAST[name](*leaves, EPS).sum(), NAIVE[name](*leaves, EPS).sum()),
        (FAST[name](*leaves, EPS)[..., ::2].sum(), NAIVE[name](*leaves, EPS)[..., ::2].sum()),
    ):
        actual, wanted = torch.autograd.grad(y, leaves), torch.autograd.grad(w, leaves)
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_keeps_x_in_its_type_and_little_else(path, name):
    leaves = [leaf.requires_grad_() for leaf in inputs(name, (10, 2, 64), torch.bfloat16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FAST[name](*leaves, EPS)
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in addresses]
    assert sum(t.numel() for t in own) <= 20 * (1 if name == "rms" else 2)


@pytest.mark.parametrize("name", FAST)
def test_gradcheck(name):
    leaves = [leaf.double().requires_grad_() for leaf in inputs(name, (3, 2, 5))]
    assert torch.autograd.gradcheck(lambda *given: FAST[name](*given, EPS), leaves)


@pytest.mark.parametrize("name", FAST)
def test_nothing_to_normalise(name):
    leaves = [leaf.requires_grad_() for leaf in inputs(name, (0, 2, 5))]
    y = FAST[name](*leaves, EPS)
    assert y.shape == (0, 2, 5)
    for gradient in torch.autograd.grad(y.sum(), leaves):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(4)}, "x is"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x is"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(0)}, "x is"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"bias": torch.zeros(4, 1)}, "bias has shape"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=named):
        layer_norm(**(arguments | change), eps=EPS)
    del arguments["bias"]
    if "bias" not in change:
        with pytest.raises(ValueError, match=named):
            rms_norm(**(arguments | change), eps=EPS)
