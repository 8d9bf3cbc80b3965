"""CEMA as a scan over blocks of steps, in plain torch.

The whole is W x for every block (a GEMM batched over channels; `maps` has the letters), a scan over
the states of each segment's blocks, and [K R] [x; h] for every block. The backward pass is the
transposed map with time reversed; the gradient of the map itself is one more GEMM, and ordinary
autograd carries it on to the parameters.

Channels are independent and are worked through in groups, and these in windows of blocks, so that
the rearranged copies of x stay in the cache and take a fraction of x's memory; backward saves
nothing but the inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..segments import Segments
from ..types import compute_dtype
from .blocks import Window, block_windows, gather, scatter
from .coefficients import coefficients, powers
from .maps import block_map, first_powers

# Steps in a block, halved where there are so few in all that building the maps costs most.
BLOCK = 32
FEW_STEPS = 1024
# Steps in a block where segments are only summed up, and in the shortest that is chosen where
# segments are so short that much of a block would be filled up.
SUMMARY_BLOCK = 128
LEAST_BLOCK = 16
# Channels whose maps exist at a time.
GROUP_CHANNELS = 256


class BlockScan(torch.autograd.Function):
    """y of segments, from the states before them (or None where all start from zero)."""

    @staticmethod
    def forward(ctx, x, alpha, delta, theta, gamma, omega, segments, state):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state)
        ctx.segments, y = segments, torch.empty_like(x)
        for group in _channel_groups(alpha):
            whole, q = _maps([z[group] for z in (alpha, delta, theta, gamma, omega)], segments)
            t, z, h = whole.shape[1] - 2 * q.shape[1], None, None
            for window in block_windows(segments, t, len(q), x.device):
                z = _room(z, window, x, whole)
                gather(x[..., group], window, z[..., :t])
                z[..., t:], h = _states_before(z, whole, q, window, state, group, h)
                scatter(torch.bmm(_matrices(z), whole[:, :t].mT), window, y[..., group])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # noqa: ANN001, ANN205
        x, *params, state = ctx.saved_tensors
        grad_x, grad_params = torch.empty_like(x), [torch.empty_like(z) for z in params]
        grad_state = None if state is None else torch.zeros_like(state)
        with torch.autocast(x.device.type, enabled=False):
            for group in _channel_groups(params[0]):
                leaves = [z[group].detach().requires_grad_() for z in params]
                with torch.enable_grad():
                    whole, q = _maps(leaves, ctx.segments)
                grad_map = _backward(
                    *(x, state, grad_y, grad_x, grad_state),
                    *(group, ctx.segments, whole.detach(), q),
                )
                grads = torch.autograd.grad(whole, leaves, grad_map)
                for z, part in zip(grad_params, grads, strict=True):
                    z[group] = part
        return grad_x, *grad_params, None, grad_state


def _backward(
    x: Tensor,
    state: Tensor | None,
    grad_y: Tensor,
    grad_x: Tensor,
    grad_state: Tensor | None,
    group: slice,
    segments: Segments,
    whole: Tensor,
    q: Tensor,
) -> Tensor:
    """Fills a group's channels of grad_x and grad_state; returns the gradient of its map.

    The gradient of [y; h_after] of every block stands in g: grad_y is given, and the rest comes
    from the segment's later blocks by the scan with time reversed.
    """
    t, z, g, h, befores = whole.shape[1] - 2 * q.shape[1], None, None, None, []
    windows = block_windows(segments, t, len(q), x.device)
    for window in windows:
        z = _room(z, window, x, whole)
        gather(x[..., group], window, z[..., :t])
        before, h = _states_before(z, whole, q, window, state, group, h)
        befores.append(before)
    grad_map, q = torch.zeros_like(whole), q.conj().resolve_conj()
    after = None
    for window in reversed(windows):
        z, g = _room(z, window, x, whole), _room(g, window, x, whole)
        gather(x[..., group], window, z[..., :t])
        z[..., t:] = befores.pop()
        gather(grad_y[..., group], window, g[..., :t])
        # The gradients of the states before the blocks, but for what the later ones add.
        grads = _as_states(torch.bmm(_matrices(g[..., :t]), whole[:, :t, t:]), g)
        levels = grads.unbind(0)
        if after is None:
            g[-1, ..., t:] = 0
        else:
            g[-1, ..., t:] = _as_pairs(after)
            torch.addcmul(levels[-1], after, q, out=levels[-1])
        for k in reversed(window.links):
            torch.addcmul(levels[k - 1], levels[k], q, out=levels[k - 1])
        g[:-1, ..., t:] = _as_pairs(grads[1:])
        g[..., t:].index_fill_(0, window.fresh - 1, 0)
        scatter(torch.bmm(_matrices(g), whole[..., :t]), window, grad_x[..., group])
        grad_map.baddbmm_(_matrices(g).mT, _matrices(z))
        for k, number in window.entries:
            grad_state[number : number + g.shape[1], group] = levels[k].to(grad_state.dtype)
        after = levels[0] if window.carried else None
    return grad_map


class Summary(torch.autograd.Function):
    """sum_t q^e x_t of each segment [S, D, N], e the steps of the segment that come after t.

    x's gradient is Re(conj(q^e) g), and log q's is g times the conjugate of sum_t e q^e x_t: that
    sum is taken along, so that backward needs nothing of x's size.
    """

    @staticmethod
    def forward(ctx, x, log_magnitude, turns, segments):  # noqa: ANN001, ANN205
        channels, ndim = turns.shape
        t, real = _block(segments, SUMMARY_BLOCK), compute_dtype(x)
        sums = x.new_empty(2, len(segments), channels, ndim, dtype=real.to_complex())
        steps = torch.arange(t - 1, -1, -1, dtype=real, device=x.device)
        for group in _channel_groups(turns):
            write, q = _writes(log_magnitude[group], turns[group], t, real)
            write, z, h = torch.cat([write, write * steps[:, None]], dim=2), None, None
            for window in block_windows(segments, t, len(q), x.device, to_end=True):
                z = _room(z, window, x, write.mT)
                gather(x[..., group], window, z)
                states = _as_states(torch.bmm(_matrices(z), write), z)
                plain, weighted = (z.unbind(0) for z in states.split(ndim, dim=3))
                for k in [0] * window.carried + window.links:
                    before, by_steps = (plain[k - 1], weighted[k - 1]) if k else h
                    # All that came before moves away from the end by a block.
                    by_steps = torch.add(by_steps, before, alpha=t)
                    torch.addcmul(weighted[k], by_steps, q, out=weighted[k])
                    torch.addcmul(plain[k], before, q, out=plain[k])
                h = plain[-1], weighted[-1]
                for k, number in window.ends:
                    rows = slice(number, number + z.shape[1])
                    sums[0, rows, group], sums[1, rows, group] = plain[k], weighted[k]
        plain, weighted = sums.unbind(0)
        ctx.save_for_backward(x, log_magnitude, turns, weighted)
        ctx.segments = segments
        return plain

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, log_magnitude, turns, weighted = ctx.saved_tensors
        t = _block(ctx.segments, SUMMARY_BLOCK)
        # Segments may be some of x's.
        grad_x = torch.zeros_like(x)
        grad_log = (grad * weighted.conj()).to(torch.complex128).sum(0)
        with torch.autocast(x.device.type, enabled=False):
            for group in _channel_groups(turns):
                write, q = _writes(log_magnitude[group], turns[group], t, compute_dtype(x))
                q, h = q.conj().resolve_conj(), None
                windows = block_windows(ctx.segments, t, len(q), x.device, to_end=True)
                for window in reversed(windows):
                    g, ends = _room(None, window, x, write), dict(window.ends)
                    for k in range(window.blocks - 1, -1, -1):
                        if k in ends:
                            rows = slice(ends[k], ends[k] + g.shape[1])
                            h = grad[rows, group].to(q.dtype)
                        else:
                            h = h * q
                        g[k] = _as_pairs(h)
                    scatter(torch.bmm(_matrices(g), write.mT), window, grad_x[..., group])
        return grad_x, grad_log.real, 2 * math.pi * grad_log.imag, None


def _block(segments: Segments, most: int) -> int:
    """Steps in a block, an even number, so that pairs after its values can be complex numbers."""
    steps = sum(segment.length for segment in segments)
    while most > LEAST_BLOCK and steps < 2 * most * len(segments):
        most //= 2
    longest = max(segment.length for segment in segments)
    return min(most, longest + longest % 2)


def _channel_groups(parameter: Tensor) -> list[slice]:
    """Slices of few channels of a parameter [D, ...], which are worked on at the same time."""
    starts = range(0, len(parameter), GROUP_CHANNELS)
    return [slice(start, min(start + GROUP_CHANNELS, len(parameter))) for start in starts]


def _maps(params: list[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """Of a group of c channels the map of a block [c, T+2N, T+2N] with its graph, and q^T [c, N].

    q^T is in double, since a rounded one would compound over the blocks.
    """
    alpha, delta, theta, gamma, omega = params
    few = segments.length * segments.batch <= FEW_STEPS
    block = _block(segments, BLOCK // 2 if few else BLOCK)
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    whole = block_map(p, log_magnitude, turns, gamma, omega, block)
    return whole, _power(log_magnitude, turns, block)


def _writes(
    log_magnitude: Tensor, turns: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a block's steps leave in the state, q^(T-1-t) as pairs [c, T, 2N], and q^T [c, N]."""
    write = first_powers(log_magnitude, turns, block - 1, dtype).flip(1)
    return _as_pairs(write), _power(log_magnitude, turns, block)


@torch.no_grad()
def _power(log_magnitude: Tensor, turns: Tensor, exponent: int) -> Tensor:
    """q^exponent, complex128 [c, N]."""
    steps = torch.tensor([exponent], device=turns.device)
    return powers(log_magnitude, turns, steps, torch.float64)[:, 0]


def _states_before(
    z: Tensor,
    whole: Tensor,
    q: Tensor,
    window: Window,
    state: Tensor | None,
    group: slice,
    h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The states before a window's blocks, pairs [blocks, rows, c, 2N], and that after the last.

    z has the window's values; h is the state after the window before, complex128 [rows, c, N].
    """
    t = z.shape[3] - 2 * q.shape[1]
    states = _as_states(torch.bmm(_matrices(z[..., :t]), whole[:, t:, :t].mT), z)
    levels = states.unbind(0)
    given = {}
    for k, number in window.entries:
        given[k] = state[number : number + z.shape[1], group].to(q.dtype)
    if window.carried:
        given[0] = h
    for k, first in given.items():
        torch.addcmul(levels[k], first, q, out=levels[k])
    for k in window.links:
        torch.addcmul(levels[k], levels[k - 1], q, out=levels[k])
    before = z.new_empty(*z.shape[:3], z.shape[3] - t)
    before[0] = 0
    before[1:] = _as_pairs(states[:-1])
    before.index_fill_(0, window.fresh, 0)
    for k, first in given.items():
        before[k] = _as_pairs(first)
    return before, levels[-1]


def _room(z: Tensor | None, window: Window, x: Tensor, matrix: Tensor) -> Tensor:
    """Room [blocks, rows, c, m] for a window, with matrix [c, ., m]: z where it fits."""
    rows = len(range(x.shape[1])[window.rows])
    shape = (window.blocks, rows, matrix.shape[0], matrix.shape[2])
    return z if z is not None and z.shape == shape else matrix.new_empty(shape)


def _matrices(z: Tensor) -> Tensor:
    """[blocks, rows, c, m] as one matrix per channel, a view [c, blocks * rows, m]."""
    return z.flatten(0, 1).transpose(0, 1)


def _as_pairs(states: Tensor) -> Tensor:
    """Complex [..., N] as real and imaginary parts, interleaved [..., 2N]: a view."""
    return torch.view_as_real(states).flatten(-2)


def _as_states(pairs: Tensor, like: Tensor) -> Tensor:
    """[c, blocks * rows, 2N] as complex128 [blocks, rows, c, N], sizes as like's."""
    shape = (*like.shape[:3], pairs.shape[2] // 2)
    states = torch.empty(shape, dtype=torch.complex128, device=pairs.device)
    _as_pairs(states).flatten(0, 1).copy_(pairs.transpose(0, 1))
    return states
