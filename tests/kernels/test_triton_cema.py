"""CEMA's Triton kernels, interpreted, against the float64 loop.

The interpreter multiplies in float32 on the CPU, whatever input_precision says; the errors here
are those of the algorithm and of its order of sums: 4e-7 at most where the portable path's
tolerance of 3e-6 is asked for.
"""

from functools import partial

import pytest
import torch

from comparing import INTERPRETED, as_stored
from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.kernels.cema.naive import cema_naive
from test_cema import (
    NAMES,
    TOLERANCE,
    as_double,
    check_against_naive,
    error,
    extreme_inputs,
    make_inputs,
)

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    from megalodon_mcore.kernels.cema import triton

    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    return triton


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 63, 65, 130])
@pytest.mark.parametrize(("batch", "channels", "ndim"), [(1, 1, 1), (2, 11, 3), (3, 8, 16)])
def test_matches_naive(batch, length, channels, ndim, return_state):
    inputs = make_inputs(batch, length, channels, ndim, length, torch.float32)
    check_against_naive(inputs, return_state=return_state)


# The fifth and last tile is whole, or has three blocks and five steps, or five steps.
@pytest.mark.parametrize(
    ("length", "segments", "with_state", "return_state"),
    [
        *((565, 1, True, True), (640, 3, True, True), (565, 3, True, True)),
        *((565, 3, False, False), (517, 3, False, True), (565, 5, True, True)),
    ],
)
def test_segments(kernels, monkeypatch, length, segments, with_state, return_state):
    """All of a row, two tiles with a shorter segment at the end, or a single tile."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2 * segments)
    inputs = make_inputs(2, length, 5, 4, dtype=torch.float32)
    cut = kernels.Cut.of(inputs[0], 4)
    assert (cut.tiles, cut.segments) == (5, segments)
    check_against_naive(inputs, with_state, return_state)


def test_tiles_as_long_as_those_of_bfloat16(kernels, monkeypatch):
    inputs = make_inputs(1, 300, 3, 4, dtype=torch.float32)
    narrow = kernels.Cut.of(inputs[0].bfloat16(), 4)
    monkeypatch.setattr(kernels, "TILE", 2 * kernels.TILE)
    wide = kernels.Cut.of(inputs[0], 4)
    assert wide == narrow and wide.tiles == 2
    check_against_naive(inputs)


def test_more_components_than_a_block_has_steps():
    check_against_naive(make_inputs(1, 48, 3, 20, dtype=torch.float32))


def test_without_a_state():
    check_against_naive(make_inputs(2, 64, 3, 4, dtype=torch.float32), with_state=False)


@pytest.mark.parametrize("strides", ["contiguous", "sliced", "expanded"])
def test_strides(strides):
    inputs = make_inputs(2, 50, 6, 4, dtype=torch.float32)
    x = inputs[0].detach()
    if strides == "contiguous":
        x = x.contiguous()
    elif strides == "sliced":
        x = torch.stack([x, x + 1], dim=-1).repeat(1, 2, 1, 1)[:, ::2, :, 1]
    else:
        x = x[:1].expand(2, -1, -1)
    inputs[0] = x.requires_grad_()
    check_against_naive(inputs)


def test_bfloat16_is_cast_only_at_the_ends():
    """Within a tile, where the sums have the same order."""
    wide = make_inputs(2, 64, 5, 16, dtype=torch.float32)
    narrow = [wide[0].detach().bfloat16().requires_grad_(), *wide[1:]]
    wide[0] = narrow[0].detach().float().requires_grad_()
    results = []
    for inputs in (narrow, wide):
        y, end = cema(*inputs, return_state=True)
        grads = torch.autograd.grad([y, end], inputs, [torch.ones_like(y), torch.ones_like(end)])
        results.append([y, grads[0], end, *grads[1:]])
    for index, (value, expected) in enumerate(zip(*results, strict=True)):
        if index < 3:
            assert torch.equal(value, as_stored(expected) if index < 2 else expected)
        else:
            # The parameters' gradients: tiles of the two types sum in another order.
            assert error(value, expected) < 5e-7


def test_extreme_parameters(kernels, monkeypatch):
    """|q| from 1 - 1e-13 to 1e-26, over segments of several tiles."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    inputs = extreme_inputs(2048)
    references = as_double(inputs)
    cut = kernels.Cut.of(inputs[0], 4)
    assert (cut.segment, cut.segments) == (6, 3)
    y, state = cema(*inputs, return_state=True)
    y_ref, state_ref = cema_naive(*references)
    for value, reference in ((y, y_ref), (state, state_ref)):
        scale = reference.abs().amax(1 if value is y else 2)
        worst = (value - reference).abs().amax(1 if value is y else 2)
        assert (worst / scale).max() < TOLERANCE
    grads = torch.autograd.grad(y.sum() + state.real.sum(), inputs)
    grad_refs = torch.autograd.grad(y_ref.sum() + state_ref.real.sum(), references)
    for name, grad, grad_ref in zip(NAMES, grads, grad_refs, strict=True):
        # Terms of theta's cancel: 1.7e-5 here, and 1.2e-5 on the portable path.
        assert error(grad, grad_ref) < (4e-5 if name == "theta" else TOLERANCE), name


@pytest.mark.parametrize("length", [16, 63, 130])
def test_uninitialized_memory_is_never_read_and_twice_gives_the_same(length, monkeypatch):
    made = []

    def poisoned(original, *args, **kwargs):
        made.append(original(*args, **kwargs).fill_(float("nan")))
        return made[-1]

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(poisoned, getattr(torch, name)))
    inputs = make_inputs(2, length, 3, 4, dtype=torch.float32)
    runs = []
    for _ in range(2):
        y, state = cema(*inputs, return_state=True)
        runs.append([y, state, *torch.autograd.grad(y.sum() + state.abs().sum(), inputs)])
    assert made
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_long_sequence_on_tensor_cores(kernels, monkeypatch, dtype):
    """One program walks 24,576 steps; sums kept in tensor cores would lose half of the digits."""
    if not INTERPRETED:
        pytest.skip("a card needs no emulation of itself")
    import interpreter

    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    inputs = [z.detach() for z in make_inputs(1, 24_576, 3, 16, dtype=torch.float32)[:6]]
    inputs[0] = inputs[0].to(dtype)
    inputs = [z.requires_grad_() for z in inputs]
    draws = torch.randn(inputs[0].shape).to(dtype)
    with interpreter.tensor_cores():
        actual = torch.autograd.grad(cema(*inputs)[0], inputs[1:], draws)
    doubles = as_double(inputs)
    # In float64 the portable path, which test_cema.py holds to the loop.
    wanted = torch.autograd.grad(cema(*doubles)[0], doubles[1:], draws.double())
    for name, a, w in zip(NAMES[1:], actual, wanted, strict=False):
        print(f"{dtype} {name}: {error(a, w):.1e}")
        assert error(a, w) < 1e-5, name


def test_precision_follows_torch(kernels):
    """By either of its settings, of which the newer makes the older's getter raise."""
    cut = kernels.Cut.of(torch.empty(1, 16, 3), 4)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, exact in (("highest", True), ("high", False)):
            torch.set_float32_matmul_precision(precision)
            assert cut.constants()["EXACT"] == exact
        torch.set_float32_matmul_precision("highest")
        for precision, exact in (("ieee", True), ("tf32", False)):
            matmul.fp32_precision = precision
            assert cut.constants()["EXACT"] == exact
    finally:
        matmul.fp32_precision = before
