"""CEMA's Triton kernels, interpreted, against the float64 loop.

The interpreter multiplies in float32 on the CPU, whatever input_precision says; the errors here
are those of the algorithm and of its order of sums: 4e-7 at most where the portable path's
tolerance of 3e-6 is asked for.
"""

import pytest
import torch
from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.segments import Segments

from comparing import INTERPRETED, random_segments
from test_cema import (
    NAMES,
    TOLERANCE,
    as_double,
    check_against_naive,
    check_other_documents_do_not_matter,
    check_summary,
    check_uninitialized_memory_is_never_read,
    documents,
    error,
    extreme_inputs,
    make_inputs,
    row_inputs,
)

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    from megalodon_mcore.kernels.cema import triton

    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    # Of which the numbers of programs here are multiples.
    monkeypatch.setattr(triton, "CHANNELS", 8)
    return triton


@pytest.mark.parametrize(
    ("length", "batch", "channels", "ndim"),
    [(1, 1, 1, 1), (16, 2, 11, 3), (130, 2, 11, 3), (130, 1, 8, 16)],
)
def test_rows_match_naive(length, batch, channels, ndim):
    segments, inputs = row_inputs(length, batch, channels, ndim, length)
    check_against_naive(inputs, segments, return_state=ndim != 16)


@pytest.mark.parametrize("seed", range(8))
def test_random_segments_match_naive(kernels, monkeypatch, seed):
    """In tiles of 128 steps or as long as bfloat16's: each alone, joined, or cut in pieces."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    monkeypatch.setattr(kernels, "TILE", (128, 512 // dtype.itemsize)[seed % 2] * dtype.itemsize)
    monkeypatch.setattr(kernels, "PROGRAMS", (1, 2, 9, 100)[seed % 4])
    monkeypatch.setattr(kernels, "JOINED", 1 + seed % 2)
    segments = random_segments(seed, rows=2, most=5)
    inputs = make_inputs(segments, 3, 4, seed, torch.float32)
    inputs[0] = inputs[0].detach().to(dtype).requires_grad_()
    check_against_naive(inputs, segments)


# The fifth and last tile is whole, or has three blocks and five steps, or five steps.
@pytest.mark.parametrize(("length", "pieces"), [(565, 1), (640, 3), (565, 3), (517, 3), (565, 5)])
def test_long_segments_come_in_pieces(kernels, monkeypatch, length, pieces):
    """All of a row, two tiles with a shorter piece at the end, or a single tile."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2 * pieces)
    segments, inputs = row_inputs(length, 2, 5, 4)
    cut = kernels.Cut.of(segments, inputs[0])
    assert (len(cut.tiles), cut.kept, cut.pieces) == (10, 8, [pieces, pieces])
    check_against_naive(inputs, segments)


def test_short_segments_are_joined(kernels, monkeypatch):
    """So that sums of the parameters' gradients are no more than for a few long ones."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    segments = documents([1] * 60 + [200], [260], [3, 20] * 9 + [53])
    inputs = make_inputs(segments, 3, 2, dtype=torch.float32)[:6]
    parts = kernels.Cut.of(segments, inputs[0]).parts
    assert parts[0, 0] == 0 and (parts[1:, 0] == parts[:-1, 1]).all()
    assert len(parts) <= (kernels.JOINED + 2) * kernels.PROGRAMS
    check_against_naive(inputs, segments, return_state=False)


def test_more_components_than_a_block_has_steps():
    segments, inputs = row_inputs(48, 1, 3, 20)
    check_against_naive(inputs, segments)


def test_without_a_state():
    segments = Segments.of_rows(64, 2)
    check_against_naive(make_inputs(segments, 3, 4, dtype=torch.float32)[:6], segments)


@pytest.mark.parametrize("strides", ["rows first", "sliced", "expanded"])
def test_strides(strides):
    segments = documents([30, 20], [50])
    inputs = make_inputs(segments, 6, 4, dtype=torch.float32)
    x = inputs[0].detach()
    if strides == "rows first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif strides == "sliced":
        x = torch.stack([x, x + 1], dim=-1).repeat(2, 1, 1, 1)[::2, ..., 1]
    else:
        x = x[:, :1].expand(-1, 2, -1)
    inputs[0] = x.requires_grad_()
    check_against_naive(inputs, segments, spread=True)


def test_bfloat16_is_cast_only_at_the_ends():
    """Within a tile, where the sums have the same order."""
    segments, wide = row_inputs(64, 2, 5, 16)
    narrow = [wide[0].detach().bfloat16().requires_grad_(), *wide[1:]]
    wide[0] = narrow[0].detach().float().requires_grad_()
    results = []
    for inputs in (narrow, wide):
        y, _ = cema(*inputs[:6], segments, inputs[6])
        results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for index, (value, expected) in enumerate(zip(*results, strict=True)):
        if index < 2:
            assert torch.equal(value, expected.bfloat16())
        else:
            # The parameters' gradients: tiles of the two types sum in another order.
            assert error(value, expected) < 5e-7


def test_extreme_parameters(kernels, monkeypatch):
    """|q| from 1 - 1e-13 to 1e-26, over pieces of several tiles."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    segments, inputs = extreme_inputs(2048)
    references = as_double(inputs)
    cut = kernels.Cut.of(segments, inputs[0])
    assert (cut.size, cut.pieces) == (6, [3])
    y, state = cema(*inputs[:6], segments, inputs[6], True)
    y_ref, state_ref = cema_naive(*references[:6], segments, references[6])
    for value, reference in ((y, y_ref), (state, state_ref)):
        scale = reference.abs().amax(0 if value is y else 2)
        worst = (value - reference).abs().amax(0 if value is y else 2)
        assert (worst / scale).max() < TOLERANCE
    grads = torch.autograd.grad(y.sum() + state.real.sum(), inputs)
    grad_refs = torch.autograd.grad(y_ref.sum() + state_ref.real.sum(), references)
    for name, grad, grad_ref in zip(NAMES, grads, grad_refs, strict=True):
        # Terms of theta's cancel: 1.7e-5 here, and 1.2e-5 on the portable path.
        assert error(grad, grad_ref) < (4e-5 if name == "theta" else TOLERANCE), name


@pytest.mark.parametrize("segments", [Segments.of_rows(130, 2), documents([1, 63, 40], [63, 41])])
def test_uninitialized_memory_is_never_read_and_twice_gives_the_same(
    kernels, monkeypatch, segments
):
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    check_uninitialized_memory_is_never_read(segments)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_other_documents_do_not_matter():
    """In one tile's program, in another's, in another row."""
    check_other_documents_do_not_matter(documents([70, 1, 29], [40, 60]))


@pytest.mark.parametrize("programs", [1, 4])
def test_summary_is_what_a_segment_leaves_behind(kernels, monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check_summary(Segments.of_rows(140, 2), [0, 1])
    check_summary(documents([300, 3, 40, 1], [44, 300]), [0, 1, 3, 5])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_long_sequence_on_tensor_cores(kernels, monkeypatch, dtype):
    """One program walks 24,576 steps; sums kept in tensor cores would lose half of the digits."""
    if not INTERPRETED:
        pytest.skip("a card needs no emulation of itself")
    import interpreter

    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    inputs = [z.detach() for z in row_inputs(24_576, 1, 3, 16)[1][:6]]
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
    x, p = torch.empty(16, 1, 3), torch.empty(3, 4)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, exact in (("highest", True), ("high", False)):
            torch.set_float32_matmul_precision(precision)
            assert kernels._constants(x, p)["EXACT"] == exact
        torch.set_float32_matmul_precision("highest")
        for precision, exact in (("ieee", True), ("tf32", False)):
            matmul.fp32_precision = precision
            assert kernels._constants(x, p)["EXACT"] == exact
    finally:
        matmul.fp32_precision = before
