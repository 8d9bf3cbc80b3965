"""timestep_norm's paths against the float64 oracle, and against what no oracle is needed for."""

import random

import pytest
import torch
from megalodon_mcore.kernels.segments import Segment, Segments
from megalodon_mcore.kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm,
    timestep_norm_naive,
    timestep_statistics,
)

from comparing import BFLOAT16, error, poisoned, seeded

PACKAGE = "timestep_norm"
TILES = {"TILE": 256, "PROGRAMS": 12, "SCAN": 64}
EPS = 1e-5
FLOAT32 = 1e-6
# With one scalar a group the first step has no variance, and in its gradient two terms of size
# 1/sqrt(eps) cancel.
ONE_SCALAR = 2**-24 / EPS**0.5


def random_inputs(segments, channels, groups, dtype=torch.float32):
    """x, weight and bias, and a state that holds NaN where no document goes on."""
    x = torch.randn(segments.batch, segments.length, channels).transpose(0, 1) * 2 + 1
    weight, bias = torch.randn(channels) / 2, torch.randn(channels)
    mean, var = torch.randn(len(segments), groups), torch.rand(len(segments), groups) + 0.5
    fresh = (segments.tensor("position", x.device) == 0)[:, None]
    state = TimestepNormState(mean.masked_fill(fresh, torch.nan), var.masked_fill(fresh, torch.nan))
    return x.to(dtype), weight, bias, state


def random_table(draw, longest):
    """1 to 3 rows, each of 1 to 8 segments that start documents or go on with them."""
    batch, length = draw.randint(1, 3), draw.choice([1, 2, draw.randint(3, longest)])
    segments = []
    for row in range(batch):
        cuts = draw.sample(range(1, length), min(draw.randint(0, 7), length - 1))
        bounds = [0, *sorted(cuts), length]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            position = draw.choice([0, 0, 1, draw.randint(2, 90)])
            segments.append(Segment(row, start, stop - start, position))
    return Segments(length, batch, segments)


def run(function, x, weight, bias, groups, segments=None, state=None, dtype=None):
    """Outputs, then gradients of x, weight, bias and the state's mean and var."""
    cast = (lambda z: z.to(dtype)) if dtype else (lambda z: z)
    leaves = [cast(z.detach()).clone().requires_grad_() for z in (x, weight, bias, *(state or ()))]
    state = TimestepNormState(*leaves[3:]) if state else None
    y, out = function(*leaves[:3], groups, EPS, segments, state, return_state=True)
    # Exact in every type, so that all see the same gradients.
    draws = [torch.randn(z.shape, generator=seeded(0)).bfloat16().to(z.dtype) for z in (y, *out)]
    gradients = torch.autograd.grad(
        (y, *out), leaves, draws, allow_unused=True, materialize_grads=True
    )
    return [y, *out, *gradients]


def mean_error(actual, expected, var):
    """Largest difference of means, relative to themselves or the deviation.

    Sums of float32 are off by the last digits of what is summed: of 3,000 groups of 6 scalars by
    6e-8 of the deviation at most, but by 8e-5 of a mean that happens to be small.
    """
    scale = torch.maximum(expected.abs(), var.sqrt())
    return float(((actual - expected).abs() / scale).detach().max())


def naive_statistics(x, groups, segments=None):
    """Mean and var of each segment's steps, float64 [S, G]."""
    segments = segments or Segments.of_rows(*x.shape[:2])
    scalars = [x[s.steps, s.row].double().unflatten(-1, (groups, -1)) for s in segments]
    return tuple(
        torch.stack([measure(z) for z in scalars])
        for measure in (lambda z: z.mean((0, 2)), lambda z: z.var((0, 2), correction=0))
    )


@pytest.mark.parametrize("seed", range(12))
def test_matches_the_oracle(path, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    segments = random_table(draw, 200 if path == "torch" else 60)
    groups, size = draw.choice([(1, 6), (3, 4), (8, 2), (7, 3), (5, 1), (2, 16)])
    halves = (torch.bfloat16, torch.float16)
    dtype = [torch.float32, halves[seed // 4 % 2], torch.float32, torch.float64][seed % 4]
    x, weight, bias, state = random_inputs(segments, groups * size, groups, dtype)
    with poisoned():
        actual = run(timestep_norm, x, weight, bias, groups, segments, state)
    wanted = run(timestep_norm_naive, x, weight, bias, groups, segments, state, dtype=torch.float64)
    rounded = {torch.bfloat16: BFLOAT16, torch.float16: 2**-11}
    for place, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        if a.dtype in rounded:
            torch.testing.assert_close(a.double(), w, rtol=rounded[a.dtype], atol=1e-5)
        elif place == 1:
            assert mean_error(a, w, wanted[2]) < FLOAT32
        else:
            assert error(a, w) < (ONE_SCALAR if size == 1 else FLOAT32)
    for a in actual[1:3]:
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_many_channels(path):
    torch.manual_seed(0)
    groups = 32 if path == "torch" else 4
    segments = Segments(40, 2, [Segment(0, 0, 40, 3), Segment(1, 0, 11, 0), Segment(1, 11, 29, 0)])
    x, weight, bias, state = random_inputs(segments, 32 * groups, groups)
    given = (x, weight, bias, groups, segments, state)
    actual = run(timestep_norm, *given)
    wanted = run(timestep_norm_naive, *given, dtype=torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w) < FLOAT32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(groups):
    torch.manual_seed(0)
    segments = Segments(5, 2, [Segment(0, 0, 5, 9), Segment(1, 0, 3, 2), Segment(1, 3, 2, 0)])
    x, weight, bias, state = random_inputs(segments, 4, groups, torch.float64)
    leaves = [z.double().nan_to_num().requires_grad_() for z in (x, weight, bias, *state)]

    def function(x, weight, bias, *state):
        before = TimestepNormState(*state)
        y, after = timestep_norm(x, weight, bias, groups, EPS, segments, before, True)
        return y, *after

    assert torch.autograd.gradcheck(function, leaves)


def pieces(bounds):
    """timestep_norm of [length, 1, D], called for a stretch after the other."""

    def function(x, weight, bias, groups, eps, segments, state, return_state):
        outputs = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            segments = Segments.of_rows(stop - start, 1, start)
            part = x[start:stop]
            y, state = timestep_norm(part, weight, bias, groups, eps, segments, state, True)
            outputs.append(y)
        return torch.cat(outputs), state

    return function


def test_a_document_gives_what_it_gives_alone(path):
    """Packed, in pieces, in rows of any strides, and to the bit whatever the others hold."""
    torch.manual_seed(0)
    groups, channels = 3, 12
    segments = Segments.of_documents([[0, 1, 24, 70], [0, 46, 69, 70]])
    x, weight, bias, _ = random_inputs(segments, channels, groups)
    x[24:, 0] = x[:46, 1]

    alone = run(timestep_norm, x[24:, :1], weight, bias, groups)
    for cut in ([0, 1, 7, 30, 46], [0, 45, 46]):
        cut = run(pieces(cut), x[24:, :1], weight, bias, groups)
        for a, w in zip(cut, alone, strict=True):
            assert error(a, w) < FLOAT32

    upstream = torch.randn(70, channels, 2).transpose(1, 2)
    upstream[24:, 0] = upstream[:46, 1]

    def packed(x):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y, after = timestep_norm(x, weight, bias, groups, EPS, segments, None, True)
        return y, *after, torch.autograd.grad(y, x, upstream)[0]

    y, mean, var, gradient = packed(x)
    assert error(y[24:, :1], alone[0]) < FLOAT32
    assert error(mean[2], alone[1][0]) < FLOAT32
    assert error(var[2], alone[2][0]) < FLOAT32
    assert torch.equal(y[24:, 0], y[:46, 1]) and torch.equal(gradient[24:, 0], gradient[:46, 1])
    for other in (torch.nan, torch.inf, torch.randn(channels) * 1e4):
        changed = x.clone()
        changed[:24, 0] = changed[46:, 1] = other
        results = packed(changed)
        for a, w in ((results[0], y), (results[3], gradient)):
            assert torch.equal(a[24:, 0], w[24:, 0]) and torch.equal(a[:46, 1], w[:46, 1])
        assert torch.equal(results[1][[2, 3]], mean[[2, 3]])


def test_any_strides_and_twice_the_same(path):
    torch.manual_seed(0)
    x = torch.randn(21, 1, 8).expand(21, 3, 8)
    weight, bias = torch.randn(2, 8)
    upstream = torch.randn(3, 1, 8).expand(3, 21, 8).transpose(0, 1)
    results = []
    for given, draw in ((x, upstream), (x, upstream), (x.contiguous(), upstream.contiguous())):
        leaf = given.detach().requires_grad_()
        with poisoned():
            y = timestep_norm(leaf, weight, bias, 4, EPS)[0]
            results.append((y, *torch.autograd.grad(y, leaf, draw)))
    for other in results[1:]:
        assert all(torch.equal(a, w) for a, w in zip(results[0], other, strict=True))
    assert timestep_norm(x[:0], weight, bias, 4, EPS)[0].shape == (0, 3, 8)


def test_many_documents_of_a_step(path):
    torch.manual_seed(0)
    length = 2000 if path == "torch" else 40
    segments = Segments.of_documents([range(length + 1)])
    x, weight, bias, _ = random_inputs(segments, 12, 3)
    actual = run(timestep_norm, x, weight, bias, 3, segments)
    rows = x.transpose(0, 1)
    wanted = run(timestep_norm, rows, weight, bias, 3)
    for a, w in zip(actual[:4], wanted[:4], strict=True):
        assert error(a, w.transpose(0, 1) if w.dim() == 3 else w) < FLOAT32


@pytest.mark.parametrize(("offset", "first"), [(0.0, 0.0), (-3e5, 0.0), (0.0, 1e3)])
def test_stays_accurate(path, offset, first):
    """With a mean far above the deviation, and with a first step unlike all others."""
    torch.manual_seed(0)
    length, channels, groups = 100_000 if path == "torch" else 600, 8, 2
    x = torch.randn(length, 1, channels) + offset
    x[0] += first
    leaf = x.clone().requires_grad_()
    weight = bias = torch.zeros(channels)
    y, after = timestep_norm(leaf, weight, bias, groups, EPS, None, None, True)

    size = channels // groups
    double = x.double().requires_grad_()
    scalars = double.view(length, groups, size) - offset
    seen = size * torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    mean = scalars.sum(-1).cumsum(0) / seen
    var = scalars.square().sum(-1).cumsum(0) / seen - mean.square()
    # Direct two-pass statistics at the end check the oracle itself.
    direct = scalars.transpose(0, 1).reshape(groups, -1).var(1, correction=0)
    assert error(var[-1], direct) < 1e-10
    normalized = (scalars - mean[..., None]) / (var[..., None] + EPS).sqrt()
    assert float((y[:, 0] - normalized.view(length, channels)).detach().abs().max()) < FLOAT32
    # A mean near zero has the rounding of terms of size 1.
    wanted = mean[-1] + offset
    assert float((after.mean[0] - wanted).detach().abs().max()) < 1e-7 * max(
        1, float(wanted.detach().abs().max())
    )
    assert error(after.var[0], var[-1]) < FLOAT32
    upstream = torch.randn(length, channels)
    gradient = torch.autograd.grad(y, leaf, upstream[:, None])[0]
    upstream = upstream.double().view(normalized.shape)
    wanted = torch.autograd.grad(normalized, double, upstream)[0]
    assert error(gradient, wanted) < FLOAT32


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("segments", "taken"),
    [
        (Segments.of_rows(1, 1), [0]),
        (Segments.of_rows(37, 2, 5), [0, 1]),
        (Segments.of_rows(9, 2), [1, 0]),
        (Segments.of_documents([[0, 1, 30, 40, 70], [0, 5, 68, 69, 70]]), [3, 4, 6]),
    ],
)
def test_statistics_of_segments(path, segments, taken, offset):
    torch.manual_seed(0)
    taken = segments.take(taken)
    x = (torch.randn(segments.batch, segments.length, 12) + offset).transpose(0, 1).requires_grad_()
    double = x.detach().double().requires_grad_()
    wanted = naive_statistics(double, 3, taken)
    actual = timestep_statistics(x, 3, taken)
    draws = [torch.randn_like(z) for z in wanted]
    gradient = torch.autograd.grad(actual, x, draws)[0]
    assert actual[0].dtype == actual[1].dtype == torch.float64
    # Where a step's mean comes from float32 sums, an error of its spread's last digits stays.
    assert mean_error(actual[0], wanted[0], wanted[1]) < 1e-7
    assert error(actual[1], wanted[1]) < FLOAT32
    assert error(gradient, torch.autograd.grad(wanted, double, draws)[0]) < FLOAT32


def test_statistics_name_what_does_not_fit():
    for x, groups in ((torch.zeros(3, 2, 6), 4), (torch.zeros(0, 2, 6), 2), (torch.zeros(3, 6), 2)):
        with pytest.raises(ValueError, match="num_groups"):
            timestep_statistics(x, groups)


@pytest.mark.parametrize("state", [False, True])
def test_no_steps(state):
    x, weight, bias = torch.zeros(0, 2, 6, requires_grad=True), torch.zeros(6), torch.zeros(6)
    state = TimestepNormState(torch.zeros(0, 3), torch.zeros(0, 3)) if state else None
    y, after = timestep_norm(x, weight, bias, 3, EPS, None, state, True)
    assert y.shape == (0, 2, 6) and after.mean.shape == after.var.shape == (0, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 6)}, "x is"),
        ({"x": torch.zeros(3, 2, 2, 3)}, "x has"),
        ({"x": torch.zeros(3, 2, 6, dtype=torch.int64)}, "x is"),
        ({"weight": torch.zeros(5)}, "weight has"),
        ({"bias": torch.zeros(6, 1)}, "bias has"),
        ({"num_groups": 4}, "num_groups is 4"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"segments": Segments.of_rows(2, 2)}, "segments are"),
        ({"segments": Segments.of_rows(3, 2, 1)}, "needs the state"),
        ({"state": TimestepNormState(torch.zeros(2, 1), torch.zeros(2, 3))}, "state.mean has"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "x": torch.zeros(3, 2, 6),
        "weight": torch.zeros(6),
        "bias": torch.zeros(6),
        "num_groups": 3,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=named):
        timestep_norm(**(arguments | change))
