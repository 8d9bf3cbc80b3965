"""CEMA in Triton: the block scan of `portable`, with T = 16 steps a block, on tensor cores.

A program walks the time of a batch row for a few channels, in tiles of M blocks: 16, or 8 of
float32. With x [T, M] of a channel's tile and h [N, M] the states before its blocks (real and
imaginary parts apart),

    y = K x + R h,   s = W x,   h_(m+1) = q^T h_m + s_m

The products are batched over channels; the recurrence over a tile's blocks is a scan in registers,
and only the state after a tile is carried on. So x is read once and y written once, and where a
gradient will be asked for, the state before every tile is kept: at N = 16 a quarter of x's bytes.

Backward walks the tiles once, in reverse. The gradients g of the states after the blocks come by
the same scan with time reversed, from the kept state the block states h come anew, and with both
at hand everything is a product: grad_x = K^T grad_y + W^T g, and for the maps grad_y x^T,
grad_y h^T, g x^T and g conj(h), which are summed in registers and contracted to the parameters'
gradients at the end.

Where channels and batch are fewer than PROGRAMS programs, time is cut into segments, and a first
walk gives what every segment adds to the state that it starts with: all segments but one of x are
read twice then, backward of grad_y. All sums are taken in a fixed order, without atomics.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import exact_float32, kernel, on_device_of, side_by_side
from .block_triton import (
    block_map,
    block_map_gradient,
    halves,
    load_channels,
    load_pair,
    outer,
    places,
    power,
    product,
    scan,
    store_pair,
    times,
    transposed,
)
from .coefficients import coefficients, powers
from .portable import cema_portable

# Steps in a block.
BLOCK = 16
# Bytes of a channel in a tile; longer ones do not fit in registers.
TILE = 512
CHANNELS = 8
WARPS = 8
# Programs that keep a card busy; with fewer, time is cut into segments.
PROGRAMS = 128


def cema_triton(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments and results as `cema`, unchecked."""
    if not x.numel():
        return cema_portable(x, alpha, delta, theta, gamma, omega, state, return_state)
    with torch.autocast(x.device.type, enabled=False):
        given = (x, *coefficients(alpha, delta, theta), gamma, omega, state)
        differentiable = torch.is_grad_enabled() and any(
            z is not None and z.requires_grad for z in given
        )
        return _Cema.apply(*given, return_state, differentiable)


class Cut(NamedTuple):
    """How [batch, length, D] is cut: `segments` a row, of `segment` tiles each but the last.

    A tile has `blocks` blocks.
    """

    batch: int
    length: int
    channels: int
    ndim: int
    blocks: int
    segment: int
    segments: int

    @classmethod
    def of(cls, x: Tensor, ndim: int) -> "Cut":
        batch, length, channels = x.shape
        blocks = TILE // BLOCK // x.element_size()
        tiles = triton.cdiv(length, BLOCK * blocks)
        wanted = triton.cdiv(PROGRAMS, batch * triton.cdiv(channels, CHANNELS))
        segment = triton.cdiv(tiles, min(tiles, wanted))
        return cls(batch, length, channels, ndim, blocks, segment, triton.cdiv(tiles, segment))

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return triton.cdiv(self.length, BLOCK * self.blocks)

    @property
    def tail(self) -> int:
        """Steps after the last whole block."""
        return self.length % BLOCK

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' sizes."""
        return self.channels, self.length, self.segment, self.segments

    def grid(self, segments: int) -> tuple[int, int]:
        return self.batch * triton.cdiv(self.channels, CHANNELS), segments

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "T": BLOCK,
            "M": self.blocks,
            "N": self.ndim,
            "NP": max(16, triton.next_power_of_2(self.ndim)),
            "DC": CHANNELS,
            "EXACT": exact_float32(),
            "num_warps": WARPS,
        }

    def states(self, like: Tensor, *shape: int) -> Tensor:
        """Room for complex states [batch, *shape, D, N]."""
        shape = (self.batch, *shape, self.channels, self.ndim, 2)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def sums(
        self, x: Tensor, maps: tuple[Tensor, ...], end: Tensor | None, reverse: bool
    ) -> Tensor:
        """The share of each segment but the last one walked in its state; see `sums_kernel`."""
        sums = self.states(x, self.segments - 1)
        if self.segments > 1:
            sums_kernel[self.grid(self.segments - 1)](
                *(x, *maps, end, sums, *self.sizes, *x.stride()[:2]),
                **self.constants(),
                REVERSE=reverse,
            )
        return sums


class _Cema(torch.autograd.Function):
    """cema as a function of what `coefficients` gives, gamma, omega and the state."""

    @staticmethod
    def forward(
        ctx,
        x,
        p,
        log_magnitude,
        turns,
        gamma,
        omega,
        state,
        return_state,
        differentiable,
    ):
        x, first = side_by_side(x), _as_real(state)
        cut = Cut.of(x, p.shape[1])
        q = torch.view_as_real(torch.polar(log_magnitude.exp(), 2 * math.pi * turns))
        maps = (p, q, gamma.contiguous(), omega.contiguous())
        y = torch.empty_like(x)
        kept = cut.states(x, cut.tiles) if differentiable else None
        whole = cut.states(x) if return_state else None
        with on_device_of(x):
            sums = cut.sums(x, maps, None, reverse=False)
            forward_kernel[cut.grid(cut.segments)](
                *(x, *maps, first, sums, y, kept, whole, *cut.sizes),
                *(*x.stride()[:2], *y.stride()[:2]),
                **cut.constants(),
            )
        whole = torch.view_as_complex(whole) if return_state else None
        ctx.save_for_backward(x, p, log_magnitude, turns, q, *maps[2:], kept, whole)
        ctx.cut, ctx.with_state = cut, state is not None
        if not return_state or not cut.tail:
            return y, whole
        return y, _state_after_tail(whole, x[:, -cut.tail :], p, log_magnitude, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_end):
        x, p, log_magnitude, turns, q, gamma, omega, kept, whole = ctx.saved_tensors
        cut, maps = ctx.cut, (p, q, gamma, omega)
        grad_y, tail, through_end = side_by_side(grad_y), None, (0, 0, 0)
        with on_device_of(x), torch.autocast(x.device.type, enabled=False):
            if whole is not None and cut.tail:
                given = (whole, x[:, -cut.tail :].float(), p, log_magnitude, turns)
                leaves = [z.detach().requires_grad_() for z in given]
                with torch.enable_grad():
                    end = _state_after_tail(*leaves)
                grad_end, tail, *through_end = torch.autograd.grad(end, leaves, grad_end)
                tail = tail.contiguous()
            end = _as_real(grad_end) if whole is not None else None
            grad_x = torch.empty_like(x)
            grad_state = cut.states(x) if ctx.with_state else None
            shape = (cut.batch, cut.segments, cut.channels, 5 * cut.ndim + 1)
            partial = torch.empty(shape, dtype=torch.float64, device=x.device)
            sums = cut.sums(grad_y, maps, end, reverse=True)
            # More stages would prefetch the kept states alone, in registers that it has not.
            backward_kernel[cut.grid(cut.segments)](
                *(x, grad_y, *maps, kept, end, tail, sums, grad_x, grad_state, partial),
                *(*cut.sizes, *x.stride()[:2], *grad_y.stride()[:2], *grad_x.stride()[:2]),
                **cut.constants(),
                num_stages=1,
            )
            total = partial.sum((0, 1))
        grads = [z + more for z, more in zip(total.split(cut.ndim, 1), through_end, strict=False)]
        grad_gamma = total[:, 3 * cut.ndim : -1].unflatten(1, (-1, 2)).to(gamma.dtype)
        grad_omega = total[:, -1:].to(omega.dtype)
        grad_state = torch.view_as_complex(grad_state) if ctx.with_state else None
        return grad_x, *grads, grad_gamma, grad_omega, grad_state, None, None


def _state_after_tail(
    state: Tensor, x: Tensor, p: Tensor, log_magnitude: Tensor, turns: Tensor
) -> Tensor:
    """The state after the few steps x that fill no block."""
    exponents = torch.arange(x.shape[1], -1, -1, device=x.device)
    q = powers(log_magnitude, turns, exponents)
    write = p[:, None].float() * q[:, 1:]
    return q[:, 0] * state + torch.einsum("btd,dtn->bdn", x.to(q.dtype), write)


def _as_real(state: Tensor | None) -> Tensor | None:
    """Complex [...] as contiguous float32 [..., 2]."""
    return None if state is None else torch.view_as_real(state.resolve_conj().contiguous())


@triton.jit
def _row_and_channels(D, DC: tl.constexpr):
    """A program's batch row and its channels [DC]."""
    blocks = tl.cdiv(D, DC)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks * DC + tl.arange(0, DC)


@triton.jit
def _load(x_ptr, row, step, d, length, D, x_batch, x_step, EXACT: tl.constexpr):
    """Steps [T, M] of each channel as a factor [DC, T, M], zeros where there are none."""
    inside = (d < D)[:, None, None] & (step < length)[None]
    at = x_ptr + row * x_batch + (step.to(tl.int64) * x_step)[None] + d[:, None, None]
    x = tl.load(at, mask=inside, other=0.0)
    # TF32 holds a bfloat16.
    return halves(x.to(tl.float32), EXACT and x.dtype == tl.float32)


@triton.jit
def _store(y_ptr, y, row, step, d, length, D, y_batch, y_step):
    inside = (d < D)[:, None, None] & (step < length)[None]
    at = y_ptr + row * y_batch + (step.to(tl.int64) * y_step)[None] + d[:, None, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _carried(real, imag, a, b, sum_real, sum_imag):
    """The state after a tile: a + ib, float64, times the one before, and what the tile adds.

    In float32, with what a and b lose there: a rounded factor would compound over the tiles.
    """
    a_high, b_high = a.to(tl.float32), b.to(tl.float32)
    low_real, low_imag = times((a - a_high).to(tl.float32), (b - b_high).to(tl.float32), real, imag)
    real, imag = times(a_high, b_high, real, imag)
    return real + (low_real + sum_real), imag + (low_imag + sum_imag)


@triton.jit
def _with_end(real, imag, end, at, here, block, M: tl.constexpr):
    """Gradients of the states before a tile's blocks [DC, N, M], with the end state's at `block`.

    `end` (or None) is the gradient of the state before that block, which the last tile alone has.
    """
    if end is not None:
        if block < M:
            more_real, more_imag = load_pair(end, at, here)
            there = (tl.arange(0, M) == block)[None, None]
            real += tl.where(there, more_real[:, :, None], 0.0)
            imag += tl.where(there, more_imag[:, :, None], 0.0)
    return real, imag


@kernel
def sums_kernel(
    x_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    end,
    sums,
    D,
    length,
    segment,
    segments,
    x_batch,
    x_step,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    """Every segment's share in the state, but the last's, to sums [batch, segments - 1, D, N].

    REVERSE: x is the gradient of y, and the sums are those of the gradient of the state, in all
    segments but the first. end: see _with_end.
    """
    row, d = _row_and_channels(D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    _within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    here, at = places(d, D, N, NP)
    real = tl.zeros([DC, NP], tl.float32)
    imag = tl.zeros([DC, NP], tl.float32)
    tiles = tl.cdiv(length, T * M)
    first = tl.program_id(1) * segment
    if REVERSE:
        first += segment
        b = -b
        if end is not None:
            whole = length == tiles * (T * M)
            real, imag = load_pair(end, row * D * N + at, here & whole & (first + segment >= tiles))
    tile_a, tile_b = power(a, b, M)
    if REVERSE:
        w_real, w_imag = r_real, r_imag
    w_real, w_imag = halves(w_real, EXACT), halves(w_imag, EXACT)
    zero = tl.zeros([DC, NP, M], tl.float32)
    m = tl.arange(0, M)
    t = tl.arange(0, T)
    count = tl.minimum(segment, tiles - first)
    for j in range(0, count):
        if REVERSE:
            tile = first + count - 1 - j
        else:
            tile = first + j
        step = tile * (T * M) + m[None] * T + t[:, None]
        x = _load(x_ptr, row, step, d, length, D, x_batch, x_step, EXACT)
        s_real = product(w_real, x, zero)
        s_imag = product(w_imag, x, zero)
        if REVERSE:
            block = length // T - tile * M
            s_real, s_imag = _with_end(s_real, s_imag, end, row * D * N + at, here, block, M)
        _real, _imag, s_real, s_imag = scan(s_real, s_imag, real, imag, a, b, M, REVERSE)
        real, imag = _carried(real, imag, tile_a, tile_b, s_real, s_imag)
    to = (row * (segments - 1) + tl.program_id(1)) * D * N + at
    store_pair(sums, to, real, imag, here)


@kernel
def forward_kernel(
    x_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    start,
    sums,
    y_ptr,
    kept,
    end,
    D,
    length,
    segment,
    segments,
    x_batch,
    x_step,
    y_batch,
    y_step,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """y of a segment, the state before each tile to `kept`, and that after the last whole block.

    start, kept and end may be None; kept: [batch, tiles, D, N].
    """
    row, d = _row_and_channels(D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    within, w_real, w_imag = halves(within, EXACT), halves(w_real, EXACT), halves(w_imag, EXACT)
    r_real, r_imag = transposed(halves(r_real, EXACT)), transposed(halves(r_imag, EXACT))
    zero = tl.zeros([DC, NP, M], tl.float32)
    tile_a, tile_b = power(a, b, M)
    here, at = places(d, D, N, NP)

    # The state that the segment starts with.
    real = tl.zeros([DC, NP], tl.float64)
    imag = tl.zeros([DC, NP], tl.float64)
    if start is not None:
        start_real, start_imag = load_pair(start, row * D * N + at, here)
        real, imag = start_real.to(tl.float64), start_imag.to(tl.float64)
    segment_a, segment_b = power(tile_a, tile_b, segment)
    for before in range(0, tl.program_id(1)):
        real, imag = times(real, imag, segment_a, segment_b)
        more = (row * (segments - 1) + before) * D * N + at
        more_real, more_imag = load_pair(sums, more, here)
        real, imag = real + more_real, imag + more_imag
    real, imag = real.to(tl.float32), imag.to(tl.float32)

    m = tl.arange(0, M)
    t = tl.arange(0, T)
    tiles = tl.cdiv(length, T * M)
    first = tl.program_id(1) * segment
    for tile in range(first, tl.minimum(first + segment, tiles)):
        step = tile * (T * M) + m[None] * T + t[:, None]
        x = _load(x_ptr, row, step, d, length, D, x_batch, x_step, EXACT)
        if kept is not None:
            store_pair(kept, (row * tiles + tile) * D * N + at, real, imag, here)
        s_real = product(w_real, x, zero)
        s_imag = product(w_imag, x, zero)
        h_real, h_imag, s_real, s_imag = scan(s_real, s_imag, real, imag, a, b, M, False)
        real, imag = _carried(real, imag, tile_a, tile_b, s_real, s_imag)
        y = product(within, x, tl.zeros([DC, T, M], tl.float32))
        y = product(r_real, halves(h_real, EXACT), y)
        y = product(r_imag, halves(h_imag, EXACT), y)
        _store(y_ptr, y, row, step, d, length, D, y_batch, y_step)
        if end is not None:
            if tile == tiles - 1:
                block = length // T - tile * M
                there = (m == block)[None, None]
                end_real = tl.sum(tl.where(there, h_real, 0.0), 2)
                end_imag = tl.sum(tl.where(there, h_imag, 0.0), 2)
                end_real = tl.where(block == M, real, end_real)
                end_imag = tl.where(block == M, imag, end_imag)
                store_pair(end, row * D * N + at, end_real, end_imag, here)


@kernel
def backward_kernel(
    x_ptr,
    grad_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    kept,
    end,
    tail,
    sums,
    grad_x,
    start,
    partial,
    D,
    length,
    segment,
    segments,
    x_batch,
    x_step,
    grad_batch,
    grad_step,
    to_batch,
    to_step,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """grad_x of a segment, its share in the parameters' gradients, and the first state's gradient.

    end: see _with_end. tail: a float32 share [batch, length % T, D] in the last steps' grad_x,
    or None. start: the first state's gradient [batch, D, N], or None. partial: float64
    [batch, segments, D, 5N + 1] for p, log|q|, q's phase in turns, gamma and omega.
    """
    row, d = _row_and_channels(D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    within, w_real, w_imag = halves(within, EXACT), halves(w_real, EXACT), halves(w_imag, EXACT)
    r_real, r_imag = halves(r_real, EXACT), halves(r_imag, EXACT)
    within, back_real, back_imag = transposed(within), transposed(w_real), transposed(w_imag)
    zero = tl.zeros([DC, NP, M], tl.float32)
    tile_a, tile_b = power(a, b, M)
    here, at = places(d, D, N, NP)
    state_at = row * D * N + at

    # The gradient of the state after the segment.
    m = tl.arange(0, M)
    t = tl.arange(0, T)
    tiles = tl.cdiv(length, T * M)
    first = tl.program_id(1) * segment
    count = tl.minimum(segment, tiles - first)
    g_real = tl.zeros([DC, NP], tl.float64)
    g_imag = tl.zeros([DC, NP], tl.float64)
    if end is not None:
        whole = length == tiles * (T * M)
        mask = here & whole & (tl.program_id(1) == segments - 1)
        end_real, end_imag = load_pair(end, state_at, mask)
        g_real, g_imag = end_real.to(tl.float64), end_imag.to(tl.float64)
    segment_a, segment_b = power(tile_a, tile_b, segment)
    for j in range(0, segments - 1 - tl.program_id(1)):
        g_real, g_imag = times(g_real, g_imag, segment_a, -segment_b)
        more = (row * (segments - 1) + segments - 2 - j) * D * N + at
        more_real, more_imag = load_pair(sums, more, here)
        g_real, g_imag = g_real + more_real, g_imag + more_imag
    g_real, g_imag = g_real.to(tl.float32), g_imag.to(tl.float32)

    to_within = tl.zeros([DC, T, T], tl.float32)
    to_w_real = tl.zeros([DC, NP, T], tl.float32)
    to_w_imag = tl.zeros([DC, NP, T], tl.float32)
    to_r_real = tl.zeros([DC, NP, T], tl.float32)
    to_r_imag = tl.zeros([DC, NP, T], tl.float32)
    to_a = tl.zeros([DC, NP], tl.float32)
    to_b = tl.zeros([DC, NP], tl.float32)
    nothing = tl.minimum(count, 0).to(tl.float32)
    # Maps stay in shared memory, to be taken from there for every product.
    for j in tl.range(0, count, disable_licm=True):
        tile = first + count - 1 - j
        step = tile * (T * M) + m[None] * T + t[:, None]
        block = length // T - tile * M
        # The gradients of the states after the blocks, and of x.
        grad = _load(grad_ptr, row, step, d, length, D, grad_batch, grad_step, EXACT)
        s_real = product(r_real, grad, zero)
        s_imag = product(r_imag, grad, zero)
        s_real, s_imag = _with_end(s_real, s_imag, end, state_at, here, block, M)
        after_real, after_imag, s_real, s_imag = scan(
            s_real, s_imag, g_real, g_imag, a, -b, M, True
        )
        g_real, g_imag = _carried(g_real, g_imag, tile_a, -tile_b, s_real, s_imag)
        back = product(within, grad, tl.zeros([DC, T, M], tl.float32))
        back = product(back_real, halves(after_real, EXACT), back)
        back = product(back_imag, halves(after_imag, EXACT), back)
        if tail is not None:
            if block < M:
                more = (row * (length % T) + t[None, :, None]) * D + d[:, None, None]
                inside = (d < D)[:, None, None] & (t < length % T)[None, :, None]
                more = tl.load(tail + more, mask=inside, other=0.0)
                back += tl.where((m == block)[None, None], more, 0.0)
        _store(grad_x, back, row, step, d, length, D, to_batch, to_step)

        # The states before the blocks, and the gradients of the maps.
        x = _load(x_ptr, row, step, d, length, D, x_batch, x_step, EXACT)
        real, imag = load_pair(kept, (row * tiles + tile) * D * N + at, here)
        to_within += outer(grad, x, nothing)
        to_w_real += outer(halves(after_real, EXACT), x, nothing)
        to_w_imag += outer(halves(after_imag, EXACT), x, nothing)
        s_real = product(w_real, x, zero)
        s_imag = product(w_imag, x, zero)
        h_real, h_imag, _real, _imag = scan(s_real, s_imag, real, imag, a, b, M, False)
        to_r_real += outer(halves(h_real, EXACT), grad, nothing)
        to_r_imag += outer(halves(h_imag, EXACT), grad, nothing)
        to_a += tl.sum(after_real * h_real + after_imag * h_imag, 2)
        to_b += tl.sum(after_imag * h_real - after_real * h_imag, 2)

    if start is not None:
        if tl.program_id(1) == 0:
            store_pair(start, state_at, g_real, g_imag, here)
    # Loaded anew, from places that look new, not to hold registers through the loop.
    d += tl.minimum(count, 0)
    here, at = places(d, D, N, NP)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    to_p, log_real, log_imag, read_real, read_imag, to_omega = block_map_gradient(
        *(to_within, to_w_real, to_w_imag, to_r_real, to_r_imag, to_a, to_b), *channels, T
    )
    program = row * segments + tl.program_id(1)
    partial += (program * D + d[:, None]) * (5 * N + 1)
    n = tl.arange(0, NP)[None]
    tl.store(partial + n, to_p, mask=here)
    tl.store(partial + N + n, log_real, mask=here)
    tl.store(partial + 2 * N + n, 6.283185307179586 * log_imag, mask=here)
    store_pair(partial + 3 * N, n, read_real * N**-0.5, read_imag * N**-0.5, here)
    tl.store(partial + 5 * N + tl.zeros([1, 1], tl.int32), to_omega[:, None], mask=(d < D)[:, None])
