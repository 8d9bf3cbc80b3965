"""gated_silu and swiglu against their float64 oracles, portable and in Triton's interpreter."""

from itertools import product

import pytest
import torch
from megalodon_mcore.kernels.gates import gated_silu, gated_silu_naive, swiglu, swiglu_naive

from comparing import BFLOAT16, poisoned, seeded

# What the `path` fixture cuts small.
PACKAGE, TILES = "gates", {"TILE": 1024, "COLUMNS": 256}
FLOAT32 = 1e-6
FAST = {"gated": gated_silu, "swiglu": swiglu}
NAIVE = {"gated": gated_silu_naive, "swiglu": swiglu_naive}
SHAPES = [(1, 2), (3, 10), (5, 3, 96), (2, 3, 7, 24), (3, 1, 1280)]


def inputs(name, shape, dtype=torch.float32, transposed=False):
    def draw():
        values = torch.randn(shape) * 3
        # Where exp(-g) runs over, or nothing is left of silu.
        values.view(-1)[:2] = torch.tensor([100.0, -100.0])
        if transposed:
            values = values.transpose(0, -2).contiguous().transpose(0, -2)
        return values.to(dtype)

    return [draw() for _ in range(2 if name == "gated" else 1)]


def run(function, leaves, dtype=None):
    """The output, then the inputs' gradients."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    y = function(*leaves)
    generator = seeded(0)
    # Exact in every type, so that all see the same gradient of y.
    draw = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw)]


@pytest.mark.parametrize("name", FAST)
def test_matches_the_oracle(path, name):
    torch.manual_seed(0)
    for shape, transposed in product(SHAPES, (False, True)):
        leaves = inputs(name, shape, transposed=transposed)
        actual, wanted = run(FAST[name], leaves), run(NAIVE[name], leaves, torch.float64)
        for a, w in zip(actual, wanted, strict=True):
            assert a.dtype == torch.float32 and a.shape == w.shape
            torch.testing.assert_close(a.double(), w, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FAST)
def test_one_of_two_with_other_strides(path, name):
    torch.manual_seed(0)
    leaves = [
        inputs(name, (7, 5, 12), transposed=i == 0)[0] for i in range(len(inputs(name, (1, 2))))
    ]
    leaves[0] = torch.cat([leaves[0], leaves[0]], dim=-1)[..., 5:17]
    for a, w in zip(run(FAST[name], leaves), run(NAIVE[name], leaves, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), w, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FAST)
def test_bfloat16(path, name):
    torch.manual_seed(0)
    leaves = inputs(name, (5, 9, 40), torch.bfloat16)
    for a, w in zip(run(FAST[name], leaves), run(NAIVE[name], leaves, torch.float64), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), w, rtol=BFLOAT16, atol=1e-5)


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
        (FAST[name](*leaves).sum(), NAIVE[name](*leaves).sum()),
        (FAST[name](*leaves)[..., ::2].sum(), NAIVE[name](*leaves)[..., ::2].sum()),
    ):
        actual, wanted = torch.autograd.grad(y, leaves), torch.autograd.grad(w, leaves)
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_keeps_its_inputs_alone(path, name):
    leaves = [leaf.requires_grad_() for leaf in inputs(name, (10, 2, 64))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FAST[name](*leaves)
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in addresses]
    assert not own


@pytest.mark.parametrize("name", FAST)
def test_gradcheck(name):
    leaves = [leaf.double().clamp(-3, 3).requires_grad_() for leaf in inputs(name, (3, 2, 4))]
    assert torch.autograd.gradcheck(FAST[name], leaves)


@pytest.mark.parametrize("name", FAST)
def test_nothing_to_gate(name):
    leaves = [torch.zeros(0, 2, 6, requires_grad=True) for _ in range(2 if name == "gated" else 1)]
    y = FAST[name](*leaves)
    assert y.shape == (0, 2, 6 if name == "gated" else 3)
    torch.autograd.grad(y.sum(), leaves)


def test_errors_name_the_argument():
    given = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="gate is torch.int64"):
        gated_silu(given.long(), given.long())
    with pytest.raises(ValueError, match="gate is .* two dimensions"):
        gated_silu(given[0], given[0])
    with pytest.raises(ValueError, match="x is torch.float64"):
        gated_silu(given, given.double())
    with pytest.raises(ValueError, match="x is .* as gate is"):
        gated_silu(given, given[:1])
    with pytest.raises(ValueError, match="hidden is .*2 F"):
        swiglu(given)
