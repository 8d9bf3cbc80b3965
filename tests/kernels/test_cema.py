"""CEMA's torch path against the float64 loop.

Errors are the largest over a tensor, relative to the largest element of the reference. Measured
in float32 over all cases here: 1e-6 at most, for outputs, states and every gradient, and 3e-7
after 100,000 steps. TOLERANCE leaves a factor of three for the GEMMs of other machines.
"""

import math

import pytest
import torch
from megalodon_mcore.kernels.cema import (
    blocks,
    cema,
    cema_summary,
    coefficients,
    maps,
    portable,
    powers,
    scan,
)
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.segments import Segment, Segments

from comparing import poisoned, random_segments, seeded

TOLERANCE = 3e-6
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
NAMES = ("x", "alpha", "delta", "theta", "gamma", "omega", "state")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads do nothing for such small tensors but wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(*rows):
    """Whole documents of given lengths, a list of them for each row."""
    return Segments.of_documents(
        [[sum(lengths[:i]) for i in range(len(lengths) + 1)] for lengths in rows]
    )


def make_inputs(segments, channels, ndim, seed=0, dtype=torch.float64):
    """x, the five parameters and a state, as leaves of the graph.

    Where a segment starts a document its state is NaN.
    """
    generator = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(segments.length, segments.batch, channels)
    params = [
        normal(channels, ndim, 1),
        normal(channels, ndim, 1),
        normal(channels, 1, 1),
        normal(channels, ndim, 2),
        normal(channels, 1),
    ]
    shape = (len(segments), channels, ndim)
    state = torch.complex(normal(*shape), normal(*shape))
    state[segments.tensor("position", state.device) == 0] = math.nan
    return [a.requires_grad_() for a in (x, *params, state)]


def row_inputs(length, batch, channels, ndim, seed=0, dtype=torch.float32):
    """Segments of whole rows that go on with a document, and their inputs."""
    segments = Segments.of_rows(length, batch, position=7)
    return segments, make_inputs(segments, channels, ndim, seed, dtype)


def as_double(tensors):
    return [
        a.detach().to(torch.complex128 if a.is_complex() else torch.float64).requires_grad_()
        for a in tensors
    ]


def error(value, reference, scale=0.0):
    assert value.shape == reference.shape
    if not reference.numel():
        return 0.0
    assert not value.isnan().any()
    scale = max(scale, reference.abs().max().item()) or 1.0
    return (value - reference).abs().max().item() / scale


def gradients(values, leaves, cotangents, **keywords):
    """Zeros where a leaf has no part in the values."""
    keywords |= {"allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(values, leaves, cotangents, **keywords)


def gradient_scales(values, leaves, generator):
    """The largest gradients over a few cotangents: with one channel a single sum may cancel."""
    scales = [0.0] * len(leaves)
    for _ in range(4):
        cotangents = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in values]
        grads = gradients(values, leaves, cotangents, retain_graph=True)
        scales = [max(s, a.abs().max().item()) for s, a in zip(scales, grads, strict=True)]
    return scales


def check_against_naive(inputs, segments, return_state=True, tolerance=TOLERANCE, spread=False):
    """Compare output, end states and every gradient for one random cotangent.

    spread: y's cotangent is one number for a channel, without memory for each step.
    """
    references = as_double(inputs)
    leaves, reference_leaves = inputs, references
    y, state = cema(*leaves[:6], segments, *leaves[6:], return_state=return_state)
    y_ref, state_ref = cema_naive(*reference_leaves[:6], segments, *reference_leaves[6:])
    assert y.dtype == inputs[0].dtype
    assert (state is not None) == return_state

    values, value_refs = [y], [y_ref]
    if return_state:
        assert state.dtype == (torch.complex128 if y.dtype == torch.float64 else torch.complex64)
        values, value_refs = [y, state], [y_ref, state_ref]
    compare(values, value_refs, leaves, reference_leaves, tolerance, spread)


def compare(values, value_refs, leaves, reference_leaves, tolerance, spread=False):
    """Values and gradients of one random cotangent, but for what half types round off."""
    generator = seeded(1)
    cotangents = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in values]
    if spread:
        cotangents[0] = cotangents[0][:1, :1].expand_as(values[0])
    grads = gradients(values, leaves, cotangents)
    cotangents = [z.to(a.dtype) for z, a in zip(cotangents, value_refs, strict=True)]
    grad_refs = gradients(value_refs, reference_leaves, cotangents, retain_graph=True)
    scales = gradient_scales(value_refs, reference_leaves, generator)
    errors = {}
    for number, (value, reference) in enumerate(zip(values, value_refs, strict=True)):
        errors[f"value {number}"] = error(value, reference) - ROUNDING.get(value.dtype, 0)
    for name, leaf, grad, *reference in zip(NAMES, leaves, grads, grad_refs, scales, strict=False):
        assert grad.dtype == leaf.dtype
        # Each value adds to x's gradient a tensor of x's type.
        rounding = len(values) * ROUNDING.get(grad.dtype, 0)
        errors["gradient of " + name] = error(grad, *reference) - rounding
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("length", [1, 2, 4, 5, 63, 64, 65, 333])
@pytest.mark.parametrize(("batch", "channels", "ndim"), [(1, 1, 1), (2, 7, 3), (1, 5, 16)])
def test_rows_match_naive(batch, length, channels, ndim, monkeypatch):
    monkeypatch.setattr(scan, "FEW_STEPS", 100)
    monkeypatch.setattr(portable, "SHORT", 4)
    check_against_naive(*row_inputs(length, batch, channels, ndim, length)[::-1])


@pytest.mark.parametrize("seed", range(16))
def test_random_segments_match_naive(seed, monkeypatch):
    """In blocks of 4 to 32 steps, and windows of few or all of them."""
    segments = random_segments(seed)
    block, channels = 4 << seed % 4, 1 + seed % 3
    monkeypatch.setattr(scan, "LEAST_BLOCK", block)
    monkeypatch.setattr(scan, "BLOCK", 2 * block)
    monkeypatch.setattr(scan, "SUMMARY_BLOCK", block)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", block * channels * (1, 5, 2**20)[seed % 3])
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[seed % 4]
    inputs = make_inputs(segments, channels, 4, seed, torch.float32)
    if dtype == torch.float64:
        inputs = as_double(inputs)
    inputs[0] = inputs[0].detach().to(dtype).requires_grad_()
    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCE
    check_against_naive(inputs, segments, tolerance=tolerance)


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("length", [3, 40, 129, 192])
def test_state_is_optional(length, return_state):
    for segments in (Segments.of_rows(length, 2), documents([1, length - 1], [length - 2, 2])):
        inputs = make_inputs(segments, 3, 16, dtype=torch.float32)[:6]
        check_against_naive(inputs, segments, return_state)


def test_many_channels_and_components(monkeypatch):
    """Groups of unequal size, and N = 32."""
    monkeypatch.setattr(scan, "GROUP_CHANNELS", 20)
    segments = documents([70], [30, 40])
    check_against_naive(make_inputs(segments, 47, 32, dtype=torch.float32), segments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strides", ["rows first", "sliced", "expanded"])
def test_strides(strides, packed):
    segments = Segments.of_rows(150, 2, position=3)
    if packed:
        segments = documents([100, 50], [1] * 60 + [90])
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


@pytest.mark.parametrize("length", [3, 100])
def test_bfloat16_rounds_only_at_the_ends(length):
    segments, inputs = row_inputs(length, 2, 5, 16)
    inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
    check_against_naive(inputs, segments)
    y, _ = cema(*inputs[:6], segments, inputs[6])
    y_float, _ = cema(inputs[0].float(), *inputs[1:6], segments, inputs[6])
    assert torch.equal(y, y_float.bfloat16())


def test_autocast_leaves_the_arithmetic_alone():
    segments, inputs = row_inputs(100, 2, 5, 16)
    plain = cema(*inputs[:6], segments, inputs[6], True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cema(*inputs[:6], segments, inputs[6], True)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [3, 21, 65, 150])
def test_double_precision(length):
    segments, inputs = row_inputs(length, 2, 3, 5, dtype=torch.float64)
    check_against_naive(inputs, segments, tolerance=2e-14)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_gradcheck(length, monkeypatch):
    for name in ("BLOCK", "LEAST_BLOCK", "SUMMARY_BLOCK"):
        monkeypatch.setattr(scan, name, 4)
    monkeypatch.setattr(portable, "SHORT", 2)
    monkeypatch.setattr(scan, "GROUP_CHANNELS", 1)
    for segments in (
        Segments.of_rows(length, 1, position=1),
        Segments(length, 1, [Segment(0, 0, 1, 2), Segment(0, 1, length - 1, 2)]),
    ):
        inputs = make_inputs(segments, 2, 2)
        assert torch.autograd.gradcheck(lambda *a, s=segments: cema(*a[:6], s, a[6], True), inputs)


def test_training_after_inference_mode():
    maps._toeplitz_basis.cache_clear()
    segments = documents([50, 20])
    inputs = make_inputs(segments, 2, 3, dtype=torch.float32)
    with torch.inference_mode():
        cema(*inputs[:6], segments, return_state=True)
    check_against_naive(inputs, segments)


def test_empty_sequence():
    inputs = [a.detach() for a in row_inputs(0, 2, 3, 4)[1]]
    y, state = cema(*inputs[:6], return_state=True)
    assert y.shape == (0, 2, 3)
    assert state.shape == (0, 3, 4)


@pytest.mark.parametrize("seed", range(3))
def test_documents_packed_or_in_pieces_are_as_alone(seed):
    """Three documents: alone; in two rows, cut in places; with their states handed on."""
    lengths, generator = (170, 1, 229), seeded(seed)
    _, (x, *params, state) = row_inputs(sum(lengths), 1, 5, 16, seed)
    whole, leaves = x.split(lengths), [x, *params, state]

    def alone():
        results = [cema(z, *params, Segments.of_rows(len(z), 1), None, True) for z in whole]
        return torch.cat([y for y, _ in results]), torch.cat([end for _, end in results])

    def in_pieces():
        """All of a piece's segments at once, in a row of their own."""
        states, outputs = dict.fromkeys(range(3)), [[], [], []]
        cuts = [
            sorted({0, n, *torch.randint(0, n + 1, (4,), generator=generator).tolist()})
            for n in lengths
        ]
        for piece in range(max(map(len, cuts)) - 1):
            have = [i for i in range(3) if piece + 1 < len(cuts[i])]
            bounds = [cuts[i][piece : piece + 2] for i in have]
            starts = [sum(b - a for a, b in bounds[:i]) for i in range(len(have))]
            segments = Segments(
                sum(b - a for a, b in bounds),
                1,
                [Segment(0, start, b - a, a) for start, (a, b) in zip(starts, bounds, strict=True)],
            )
            parts = [whole[i][a:b] for i, (a, b) in zip(have, bounds, strict=True)]
            before = [states[i] if piece else torch.full_like(state[0], math.nan) for i in have]
            y, after = cema(torch.cat(parts), *params, segments, torch.stack(before), True)
            for i, z, end in zip(have, y.split([b - a for a, b in bounds]), after, strict=True):
                states[i] = end
                outputs[i].append(z)
        return torch.cat([z for o in outputs for z in o]), torch.stack(
            [states[i] for i in range(3)]
        )

    def packed():
        rows = torch.stack([x[:200, 0], x[200:, 0]], dim=1)
        segments = Segments(
            200,
            2,
            [Segment(0, 0, 170, 0), Segment(0, 170, 1, 0), Segment(0, 171, 29, 0)]
            + [Segment(1, 0, 200, 29)],
        )
        head = segments.take([2])
        given = torch.cat([torch.full_like(state, math.nan).expand(3, -1, -1)] * 1)
        given = torch.cat([given, cema_summary(rows, *params[:3], head)])
        y, end = cema(rows, *params, segments, given, True)
        return y.transpose(0, 1).flatten(0, 1)[:, None], end[[0, 1, 3]]

    y, end = alone()
    draws = torch.randn(y.shape, generator=generator)
    wanted = gradients([y.mul(draws).sum() + end.abs().sum()], leaves, None)
    for way in (in_pieces, packed):
        values = way()
        grads = gradients([values[0].mul(draws).sum() + values[1].abs().sum()], leaves, None)
        for a, b in zip((*values, *grads), (y, end, *wanted), strict=True):
            assert error(a, b) < TOLERANCE


def test_earlier_outputs_do_not_see_later_inputs():
    segments, (x, *rest, state) = row_inputs(150, 1, 3, 4)
    y, _ = cema(x, *rest, segments, state)
    changed = x.detach().clone()
    changed[77:] += 1
    y_changed, _ = cema(changed, *rest, segments, state)
    assert torch.equal(y[:77], y_changed[:77])
    assert (y[77:] != y_changed[77:]).any(-1).all()


def check_other_documents_do_not_matter(segments, tolerance=None):
    """Not a bit of outputs and input gradients, whatever the first segment's document holds."""
    inputs = make_inputs(segments, 3, 4, dtype=torch.float32)
    other = segments.positions(inputs[0].device) >= 0
    first = segments[0]
    other[first.steps, first.row] = False
    results = []
    for value in (1.0, math.nan, math.inf):
        x = inputs[0].detach().clone()
        x[first.steps, first.row] *= value
        x.requires_grad_()
        y, end = cema(x, *inputs[1:6], segments, inputs[6], True)
        grad = torch.autograd.grad([y, end], x, [torch.ones_like(y), torch.ones_like(end)])[0]
        results.append((y[other], end[1:], grad[other]))
    for values in zip(*results, strict=True):
        assert not values[0].isnan().any()
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


@pytest.mark.parametrize("segments", [documents([70, 1, 29], [40, 60]), Segments.of_rows(90, 3)])
def test_other_documents_do_not_matter(segments):
    check_other_documents_do_not_matter(segments)


def test_thousands_of_documents_of_a_step():
    segments = documents([1] * 1000 + [500], [2] * 750)
    check_against_naive(make_inputs(segments, 2, 2, dtype=torch.float32)[:6], segments)


def extreme_inputs(length):
    """Channels whose |q| runs from 1 - 1e-13 through 0.5 to 1e-26, at slow and fast phases."""
    extremes = [(-30.0, 0.0), (-12.0, 3.0), (-7.0, -7.0), (0.0, 0.0), (8.0, 8.0), (60.0, 60.0)]
    phases = [-18.0, -3.0, 0.0, 20.0]
    grid = [(a, d, t) for a, d in extremes for t in phases]
    segments, (x, alpha, delta, theta, gamma, omega, state) = row_inputs(length, 1, len(grid), 4)
    with torch.no_grad():
        alpha.copy_(torch.tensor([a for a, _, _ in grid])[:, None, None].expand_as(alpha))
        delta.copy_(torch.tensor([d for _, d, _ in grid])[:, None, None].expand_as(delta))
        theta.copy_(torch.tensor([t for _, _, t in grid])[:, None, None])
    return segments, [x, alpha, delta, theta, gamma, omega, state]


def test_extreme_parameters_gradients():
    segments, inputs = extreme_inputs(300)
    references = as_double(inputs)
    y, state = cema(*inputs[:6], segments, inputs[6], True)
    y_ref, state_ref = cema_naive(*references[:6], segments, references[6])
    grads = torch.autograd.grad(y.sum() + state.real.sum(), inputs)
    grad_refs = torch.autograd.grad(y_ref.sum() + state_ref.real.sum(), references)
    for grad, grad_ref in zip(grads, grad_refs, strict=True):
        assert error(grad, grad_ref) < TOLERANCE


def test_hundred_thousand_steps():
    length = 100_000
    segments, inputs = extreme_inputs(length)
    inputs = [a.detach() for a in inputs]
    y, end = cema(*inputs[:6], segments, inputs[6], True)

    # The recurrence in complex128 with one operation pair a step, the outputs all at once.
    x, alpha, delta, theta, gamma, omega, state = (a.detach() for a in as_double(inputs))
    ndim = alpha.shape[1]
    p = torch.sigmoid(alpha)
    angle = 2 * math.pi / ndim * torch.sigmoid(theta) * torch.arange(1, ndim + 1)[:, None]
    q = torch.polar(1 - p * torch.sigmoid(delta), angle)[..., 0]
    states = (p[..., 0] * x[:, 0, :, None]).to(torch.complex128)
    h = state[0]
    for after in states.unbind(0):
        h = after.addcmul_(q, h)
    y_ref = (states * torch.view_as_complex(gamma)).sum(-1).real / math.sqrt(ndim)
    y_ref += omega[:, 0] * x[:, 0]

    # Channel by channel: their sizes differ by far.
    scale = y_ref.abs().amax(0)
    assert ((y[:, 0] - y_ref).abs().amax(0) / scale).max() < TOLERANCE
    scale = h.abs().amax(1)
    assert ((end[0] - h).abs().amax(1) / scale).max() < TOLERANCE


def check_uninitialized_memory_is_never_read(segments):
    """No NaN comes out, and twice the same bits."""
    inputs, runs = make_inputs(segments, 3, 4, dtype=torch.float32), []
    for _ in range(2):
        with poisoned():
            y, state = cema(*inputs[:6], segments, inputs[6], True)
            some = cema_summary(*inputs[:4], segments.take([len(segments) - 1]))
            grads = torch.autograd.grad(y.sum() + (state + some).abs().sum(), inputs[:6])
            runs.append([y, state, some, *grads])
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.parametrize("length", [1, 17, 63, 64, 130])
def test_uninitialized_memory_is_never_read(length):
    check_uninitialized_memory_is_never_read(Segments.of_rows(length, 2))
    check_uninitialized_memory_is_never_read(documents([1, length, 40], [length, 41]))


def test_powers_of_large_exponents():
    """q^t against exact phases: theta = 0 turns N = 4 components by multiples of an eighth."""
    zero = torch.zeros(1, 4, 1)
    _, log_magnitude, turns = coefficients(zero - 40, zero, torch.zeros(1, 1, 1))
    exponents = torch.tensor([0, 1, 10**6 + 1, 10**8 + 3])
    value = powers(log_magnitude, turns, exponents)
    n = torch.arange(1, 5)
    angle = 2 * math.pi * ((exponents[:, None] * n) % 8).double() / 8
    reference = torch.polar(torch.ones_like(angle), angle)
    assert error(value[0], reference) < 2e-7


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("x", lambda a: a.squeeze(1)),
        ("x", lambda a: a.long()),
        ("alpha", lambda a: a[:, :, 0]),
        ("delta", lambda a: a[:, :2]),
        ("theta", lambda a: a[:, 0]),
        ("gamma", lambda a: a[..., :1]),
        ("omega", lambda a: a.bfloat16()),
        ("state", lambda a: a[:1]),
        ("state", lambda a: a.real),
    ],
)
def test_bad_arguments_are_named(name, bad):
    segments, inputs = row_inputs(5, 2, 3, 4)
    inputs = [a.detach() for a in inputs]
    if name == "x":
        segments, inputs[0] = None, inputs[0][:, :1]
    inputs[NAMES.index(name)] = bad(inputs[NAMES.index(name)])
    with pytest.raises(ValueError, match=f"^{name} is .* must be "):
        cema(*inputs[:6], segments, inputs[6])


def test_a_document_that_goes_on_needs_its_state():
    segments, inputs = row_inputs(5, 2, 3, 4)
    with pytest.raises(ValueError, match="it needs the state before it"):
        cema(*inputs[:6], segments)


def check_summary(segments, some, tolerance=TOLERANCE):
    """Of some segments, against the loop over each alone; no other step of x matters."""
    inputs = make_inputs(segments, 5, 3)
    x, *parameters = inputs[:4]
    taken = segments.take(some)
    with torch.no_grad():
        beside = torch.ones(x.shape[:2], dtype=torch.bool)
        for segment in taken:
            beside[segment.steps, segment.row] = False
        x[beside] = math.nan
    expected = []
    for segment in taken:
        alone = x[segment.steps, segment.row][:, None]
        expected.append(cema_naive(alone, *parameters, *inputs[4:6])[1])
    singles = [z.detach().float().requires_grad_() for z in inputs[:4]]
    actual = cema_summary(*singles, taken)
    assert actual.dtype == torch.complex64
    compare([actual], [torch.cat(expected)], singles, inputs[:4], tolerance)


@pytest.mark.parametrize("elements", [100, 2**20])
@pytest.mark.parametrize("length", [1, 16, 127, 300])
def test_summary_is_what_a_segment_leaves_behind(length, elements, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    check_summary(Segments.of_rows(length, 2), [0, 1])
    check_summary(documents([length, 3, 40, 1], [44, length]), [0, 1, 3, 5])


@pytest.mark.parametrize("power", [64, 200])
def test_powers_have_gradients_where_they_underflow(power):
    """|q|^power runs through the denormal numbers down to zero."""
    log_magnitude = (-torch.linspace(85, 110, 200, dtype=torch.float64) / power).view(-1, 1)
    log_magnitude.requires_grad_()
    turns = torch.full_like(log_magnitude, 0.3).requires_grad_()
    q = powers(log_magnitude, turns, torch.tensor([power]))
    gradients = torch.autograd.grad(torch.view_as_real(q).sum(), [log_magnitude, turns])
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient.abs().max() < 1e-30
