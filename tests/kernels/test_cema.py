"""CEMA's torch path against the float64 loop.

Errors are the largest over a tensor, relative to the largest element of the reference. Measured
in float32 over all cases here: 9e-7 at most, for outputs, states and every gradient, and 3e-7
after 100,000 steps. TOLERANCE leaves a factor of three for the GEMMs of other machines.
"""

import math
from functools import partial

import pytest
import torch
from megalodon_mcore.kernels.cema import (
    cema,
    cema_response,
    coefficients,
    maps,
    portable,
    powers,
    scan,
)
from megalodon_mcore.kernels.cema.naive import cema_naive

from comparing import seeded

TOLERANCE = 3e-6
NAMES = ("x", "alpha", "delta", "theta", "gamma", "omega", "state")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads do nothing for such small tensors but wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(batch, length, channels, ndim, seed=0, dtype=torch.float64):
    """x (a transposed view), the five parameters and a state, as leaves of the graph."""
    generator = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(length, batch, channels).transpose(0, 1)
    params = [
        normal(channels, ndim, 1),
        normal(channels, ndim, 1),
        normal(channels, 1, 1),
        normal(channels, ndim, 2),
        normal(channels, 1),
    ]
    state = torch.complex(normal(batch, channels, ndim), normal(batch, channels, ndim))
    return [a.requires_grad_() for a in (x, *params, state)]


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


def gradient_scales(values, leaves, generator):
    """The largest gradients over a few cotangents: with one channel a single sum may cancel."""
    scales = [0.0] * len(leaves)
    for _ in range(4):
        cotangents = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in values]
        grads = torch.autograd.grad(values, leaves, cotangents, retain_graph=True)
        scales = [max(s, a.abs().max().item()) for s, a in zip(scales, grads, strict=True)]
    return scales


def check_against_naive(inputs, with_state=True, return_state=True, tolerance=TOLERANCE):
    """Compare output, end state and every gradient for one random cotangent."""
    references = as_double(inputs)
    leaves, reference_leaves = inputs, references
    if not with_state:
        leaves, reference_leaves = inputs[:6], references[:6]
    y, state = cema(*leaves, return_state=return_state)
    y_ref, state_ref = cema_naive(*reference_leaves)
    assert y.dtype == inputs[0].dtype
    assert (state is not None) == return_state

    generator = seeded(1)
    cotangent = torch.randn(y.shape, generator=generator).to(y.dtype)
    values, value_refs = [y], [y_ref]
    cotangents, cotangent_refs = [cotangent], [cotangent.double()]
    if return_state:
        assert state.dtype == (torch.complex128 if y.dtype == torch.float64 else torch.complex64)
        cotangent = torch.randn(state.shape, generator=generator, dtype=torch.complex64)
        values.append(state)
        value_refs.append(state_ref)
        cotangents.append(cotangent.to(state.dtype))
        cotangent_refs.append(cotangent.to(torch.complex128))
    grads = torch.autograd.grad(values, leaves, cotangents)
    grad_refs = torch.autograd.grad(value_refs, reference_leaves, cotangent_refs, retain_graph=True)
    scales = gradient_scales(value_refs, reference_leaves, generator)

    bf16 = 2**-8 if y.dtype == torch.bfloat16 else 0
    errors = {"y": error(y, y_ref) - bf16}
    if return_state:
        errors["end state"] = error(state, state_ref)
    for name, leaf, grad, *reference in zip(NAMES, leaves, grads, grad_refs, scales, strict=False):
        assert grad.dtype == leaf.dtype
        errors["gradient of " + name] = error(grad, *reference) - (bf16 if name == "x" else 0)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("length", [1, 2, 4, 5, 63, 64, 65, 127, 128, 200, 333])
@pytest.mark.parametrize(("batch", "channels", "ndim"), [(1, 1, 1), (2, 7, 3), (1, 5, 16)])
@pytest.mark.parametrize("block", [32, 64])
def test_matches_naive(batch, length, channels, ndim, block, monkeypatch):
    monkeypatch.setattr(maps, "BLOCK", block)
    monkeypatch.setattr(maps, "FEW_STEPS", 0)
    monkeypatch.setattr(portable, "SHORT", 4)
    check_against_naive(make_inputs(batch, length, channels, ndim, length, torch.float32))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("length", [3, 40, 129, 192])
def test_state_is_optional(length, with_state, return_state):
    inputs = make_inputs(2, length, 3, 16, dtype=torch.float32)
    check_against_naive(inputs, with_state, return_state)


def test_many_channels_and_components():
    """More channels than one group takes, in groups of unequal size, and N = 32."""
    assert scan.GROUP_CHANNELS < 300
    check_against_naive(make_inputs(3, 70, 135, 32, dtype=torch.float32))


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced", "expanded"])
def test_strides(strides):
    inputs = make_inputs(2, 150, 6, 4, dtype=torch.float32)
    x = inputs[0].detach()
    if strides == "contiguous":
        x = x.contiguous()
    elif strides == "sliced":
        x = torch.stack([x, x + 1], dim=-1).repeat(1, 2, 1, 1)[:, ::2, :, 1]
    elif strides == "expanded":
        x = x[:1].expand(2, -1, -1)
    inputs[0] = x.requires_grad_()
    check_against_naive(inputs)
    y, _ = cema(*inputs)
    if strides == "transposed":
        assert y.stride() == x.stride()


@pytest.mark.parametrize("length", [3, 100])
def test_bfloat16_rounds_only_at_the_ends(length):
    inputs = make_inputs(2, length, 5, 16, dtype=torch.float32)
    inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
    check_against_naive(inputs)
    y, _ = cema(*inputs)
    y_float, _ = cema(inputs[0].float(), *inputs[1:])
    assert torch.equal(y, y_float.bfloat16())


def test_autocast_leaves_the_arithmetic_alone():
    inputs = make_inputs(2, 100, 5, 16, dtype=torch.float32)
    plain, _ = cema(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = cema(*inputs)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("length", [3, 21, 65, 150])
def test_double_precision(length):
    check_against_naive(make_inputs(2, length, 3, 5), tolerance=2e-14)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_gradcheck(length, monkeypatch):
    monkeypatch.setattr(maps, "BLOCK", 4)
    monkeypatch.setattr(portable, "SHORT", 2)
    monkeypatch.setattr(scan, "GROUP_CHANNELS", 1)
    inputs = make_inputs(1, length, 2, 2)
    assert torch.autograd.gradcheck(lambda *a: cema(*a, return_state=True), inputs)


def test_training_after_inference_mode():
    maps._toeplitz_basis.cache_clear()
    inputs = make_inputs(1, 50, 2, 3, dtype=torch.float32)
    with torch.inference_mode():
        cema(*inputs)
    check_against_naive(inputs)


def test_empty_sequence():
    inputs = make_inputs(2, 0, 3, 4, dtype=torch.float32)
    y, state = cema(*inputs, return_state=True)
    assert y.shape == (2, 0, 3)
    assert torch.equal(state, inputs[6])
    _, state = cema(*inputs[:6], return_state=True)
    assert torch.equal(state, torch.zeros_like(inputs[6]))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_equal_the_whole(seed):
    length = 400
    x, *params, state = make_inputs(2, length, 5, 16, seed, torch.float32)
    generator = seeded(seed)
    cuts = torch.randint(0, length + 1, (8,), generator=generator).sort().values.tolist()
    pieces, piece_state = [], state
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        y, piece_state = cema(x[:, start:stop], *params, piece_state, return_state=True)
        pieces.append(y)
    y, end = cema(x, *params, state, return_state=True)
    assert error(torch.cat(pieces, dim=1), y) < TOLERANCE
    assert error(piece_state, end) < TOLERANCE

    leaves = [x, *params, state]
    cotangent = torch.randn(y.shape, generator=generator)
    whole = torch.autograd.grad([y.mul(cotangent).sum() + end.abs().sum()], leaves)
    parts = torch.cat(pieces, dim=1).mul(cotangent).sum() + piece_state.abs().sum()
    for a, b in zip(torch.autograd.grad(parts, leaves), whole, strict=True):
        assert error(a, b) < TOLERANCE


def test_earlier_outputs_do_not_see_later_inputs():
    x, *rest = make_inputs(1, 150, 3, 4, dtype=torch.float32)
    y, _ = cema(x, *rest)
    changed = x.detach().clone()
    changed[:, 77:] += 1
    y_changed, _ = cema(changed, *rest)
    assert torch.equal(y[:, :77], y_changed[:, :77])
    assert (y[:, 77:] != y_changed[:, 77:]).any(-1).all()


def extreme_inputs(length):
    """Channels whose |q| runs from 1 - 1e-13 through 0.5 to 1e-26, at slow and fast phases."""
    extremes = [(-30.0, 0.0), (-12.0, 3.0), (-7.0, -7.0), (0.0, 0.0), (8.0, 8.0), (60.0, 60.0)]
    phases = [-18.0, -3.0, 0.0, 20.0]
    grid = [(a, d, t) for a, d in extremes for t in phases]
    x, alpha, delta, theta, gamma, omega, state = make_inputs(
        1, length, len(grid), 4, dtype=torch.float32
    )
    with torch.no_grad():
        alpha.copy_(torch.tensor([a for a, _, _ in grid])[:, None, None].expand_as(alpha))
        delta.copy_(torch.tensor([d for _, d, _ in grid])[:, None, None].expand_as(delta))
        theta.copy_(torch.tensor([t for _, _, t in grid])[:, None, None])
    return [x, alpha, delta, theta, gamma, omega, state]


def test_extreme_parameters_gradients():
    inputs = extreme_inputs(300)
    references = as_double(inputs)
    y, state = cema(*inputs, return_state=True)
    y_ref, state_ref = cema_naive(*references)
    grads = torch.autograd.grad(y.sum() + state.real.sum(), inputs)
    grad_refs = torch.autograd.grad(y_ref.sum() + state_ref.real.sum(), references)
    for grad, grad_ref in zip(grads, grad_refs, strict=True):
        assert error(grad, grad_ref) < TOLERANCE


def test_hundred_thousand_steps():
    length = 100_000
    inputs = [a.detach() for a in extreme_inputs(length)]
    y, end = cema(*inputs, return_state=True)

    # The recurrence in complex128 with one operation pair a step, the outputs all at once.
    x, alpha, delta, theta, gamma, omega, state = (a.detach() for a in as_double(inputs))
    ndim = alpha.shape[1]
    p = torch.sigmoid(alpha)
    angle = 2 * math.pi / ndim * torch.sigmoid(theta) * torch.arange(1, ndim + 1)[:, None]
    q = torch.polar(1 - p * torch.sigmoid(delta), angle)[..., 0]
    states = (p[..., 0] * x[0, :, :, None]).to(torch.complex128)
    h = state[0]
    for after in states.unbind(0):
        h = after.addcmul_(q, h)
    y_ref = (states * torch.view_as_complex(gamma)).sum(-1).real / math.sqrt(ndim)
    y_ref += omega[:, 0] * x[0]

    # Channel by channel: their sizes differ by far.
    scale = y_ref.abs().amax(0)
    assert ((y[0] - y_ref).abs().amax(0) / scale).max() < TOLERANCE
    scale = h.abs().amax(1)
    assert ((end[0] - h).abs().amax(1) / scale).max() < TOLERANCE


@pytest.mark.parametrize("length", [1, 17, 63, 64, 130])
def test_uninitialized_memory_is_never_read(length, monkeypatch):
    """Fill what torch.empty and empty_like give with NaN; no NaN may come out."""
    made = []

    def poisoned(original, *args, **kwargs):
        made.append(original(*args, **kwargs).fill_(float("nan")))
        return made[-1]

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(poisoned, getattr(torch, name)))
    inputs = make_inputs(2, length, 3, 4, dtype=torch.float32)
    y, state = cema(*inputs, return_state=True)
    grads = torch.autograd.grad(y.sum() + state.abs().sum(), inputs)
    assert made or length <= portable.SHORT
    for tensor in (y, state, *grads):
        assert not tensor.isnan().any()


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
        ("x", lambda a: a[0]),
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
    inputs = [a.detach() for a in make_inputs(2, 5, 3, 4, dtype=torch.float32)]
    inputs[NAMES.index(name)] = bad(inputs[NAMES.index(name)])
    with pytest.raises(ValueError, match=f"^{name} is .* must be "):
        cema(*inputs)


@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 200])
def test_response_is_what_zeros_after_a_state_give(length):
    x, *parameters, omega, state = make_inputs(2, length, 5, 3)
    leaves = [state, *parameters]
    expected, _ = cema_naive(torch.zeros_like(x), *parameters, omega, state)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    singles = [
        leaf.detach().to(torch.complex64 if leaf is state else torch.float32) for leaf in leaves
    ]
    for leaf in singles:
        leaf.requires_grad_()
    actual = cema_response(*singles, length)
    assert actual.dtype == torch.float32
    assert error(actual, expected) < TOLERANCE
    gradients = torch.autograd.grad(actual, singles, upstream.float())
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert error(gradient, reference) < TOLERANCE


def test_response_names_what_does_not_fit():
    _, *parameters, _, state = make_inputs(2, 4, 5, 3)
    with pytest.raises(ValueError, match="state is torch.complex128"):
        cema_response(state[..., :2], *parameters, 4)
    with pytest.raises(ValueError, match="length is 0"):
        cema_response(state, *parameters, 0)


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
