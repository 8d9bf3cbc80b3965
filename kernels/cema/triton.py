"""CEMA in Triton: the block scan of `scan`, with T = 16 steps a block, on tensor cores.

A segment is cut into tiles of M blocks: 16, or 8 of float32. With x [T, M] of a channel's tile and
h [N, M] the states before its blocks (real and imaginary parts apart),

    y = K x + R h,   s = W x,   h_(m+1) = q^T h_m + s_m

The products are batched over channels; the recurrence over a tile's blocks is a scan in registers,
and only the state after a tile is carried on. So x is read once and y written once, and where a
gradient will be asked for, the state before every tile but a segment's first is kept: at N = 16 a
quarter of x's bytes.

Backward walks the tiles once, in reverse. The gradients g of the states after the blocks come by
the same scan with time reversed, from the kept state the block states h come anew, and with both
at hand everything is a product: grad_x = K^T grad_y + W^T g, and for the maps grad_y x^T,
grad_y h^T, g x^T and g conj(h), which are summed in registers and contracted to the parameters'
gradients at the end.

A program walks a part: short segments one after another, or one, or a piece of a long one. Pieces
there are where programs would be fewer than PROGRAMS; then a first walk gives what each adds to
the state that it starts with: all pieces but one of x are read twice then, backward of grad_y. All
sums are taken in a fixed order, without atomics.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import exact_float32, kernel, on_device_of, side_by_side
from ..segments import Segments, numbered
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

# Steps in a block.
BLOCK = 16
# Bytes of a channel in a tile; longer ones do not fit in registers.
TILE = 512
CHANNELS = 4
WARPS = 4
# Programs that keep a card busy; with fewer, segments are cut, and of many times as many, which
# each leave sums of gradients behind, short ones are joined.
PROGRAMS = 128
JOINED = 4


def cema_triton(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> Tensor:
    """y of `cema`, from the same arguments, unchecked."""
    given = (x, *coefficients(alpha, delta, theta), gamma, omega, state)
    differentiable = torch.is_grad_enabled() and any(
        z is not None and z.requires_grad for z in given
    )
    return _Cema.apply(*given, segments, differentiable)


class Cut(NamedTuple):
    """Segments cut into tiles, and these into parts, one for each program of a channel block."""

    tiles: Tensor
    """int32 [tiles, 5]: row, first step, the segment's first step and the one after its last, and
    which state comes before: of a segment's first tile -1 for zero or -2 - s for that given for
    segment s, else the place among those kept."""
    parts: Tensor
    """int32 [parts, 6]: first tile, the one after the last, the parts with the first and the last
    piece of the same segment, the segment, and how many of its steps come later."""
    size: int
    """Tiles of a piece, but of a segment's last."""
    kept: int
    """States to keep."""
    pieces: list[int]
    """Of each segment the number of parts, where none are joined."""

    @classmethod
    def of(cls, segments: Segments, x: Tensor, to_end: bool = False) -> "Cut":
        """Tiles from each segment's start, or back from its end; then no segments are joined."""
        steps = TILE // x.element_size()
        programs = triton.cdiv(x.shape[2], CHANNELS)
        key = ("CEMA tiles", steps, programs, PROGRAMS, to_end, x.device)
        return segments.kept(key, lambda: cls._made(segments, steps, programs, to_end, x.device))

    @classmethod
    def _made(
        cls, segments: Segments, steps: int, programs: int, to_end: bool, device: torch.device
    ) -> "Cut":
        row, start, length, position = segments.table().unbind(1)
        counts = -(-length // steps)
        segment, number = numbered(torch.arange(len(length))[:, None], 0, counts).unbind(1)
        first = start + length - counts * steps if to_end else start
        before = (number > 0).cumsum(0) - 1
        fresh = torch.where(position > 0, -2 - torch.arange(len(length)), -1)
        tiles = torch.stack(
            [
                row[segment],
                first[segment] + number * steps,
                start[segment],
                (start + length)[segment],
                torch.where(number > 0, before, fresh[segment]),
            ],
            dim=1,
        )
        wanted = triton.cdiv(PROGRAMS, programs)
        size = triton.cdiv(len(segment), wanted)
        joined = 0 if to_end else len(segment) // max(wanted, JOINED * PROGRAMS // programs)
        parts = torch.tensor(list(_parts(counts.tolist(), size, joined)))
        last = tiles[parts[:, 1] - 1]
        later = (last[:, 3] - last[:, 1] - steps).clamp_min(0)
        parts = torch.cat([parts, segment[parts[:, :1]], later[:, None]], dim=1)
        tiles, parts = (z.int().to(device) for z in (tiles, parts))
        return cls(tiles, parts, size, int((number > 0).sum()), (-(-counts // size)).tolist())

    def grid(self, channels: int) -> tuple[int]:
        return (len(self.parts) * triton.cdiv(channels, CHANNELS),)

    def sums(
        self, x: Tensor, maps: tuple[Tensor, ...], start: Tensor | None, reverse: bool
    ) -> Tensor:
        """What each piece that needs it adds to the state; see `sums_kernel`."""
        sums = _states(len(self.parts), maps[0])
        if max(self.pieces) > 1:
            sums_kernel[self.grid(x.shape[2])](
                *(x, *maps, start, sums, None, self.tiles, self.parts, x.shape[2], self.size),
                *x.stride()[:2],
                **_constants(x, maps[0]),
                REVERSE=reverse,
            )
        return sums


def _parts(counts: list[int], size: int, joined: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each part its first tile, that after its last, and the first and last part of its segment.

    counts: segments' tiles. Those of more than `size` come in pieces; others are joined as long as
    they have no more than that in all, and where one alone has fewer than `joined`.
    """
    number = begin = end = 0
    for tiles in [*counts, size + 1]:
        if end > begin and (end - begin >= joined or end - begin + tiles > size):
            yield begin, end, number, number
            number, begin = number + 1, end
        end += tiles
        if tiles > size and end <= sum(counts):
            last = number + triton.cdiv(tiles, size) - 1
            for piece in range(begin, end, size):
                yield piece, min(piece + size, end), number, last
            number, begin = last + 1, end


def _constants(x: Tensor, p: Tensor) -> dict[str, Any]:
    """The kernels' compile-time arguments."""
    return {
        "T": BLOCK,
        "M": TILE // BLOCK // x.element_size(),
        "N": p.shape[1],
        "NP": max(16, triton.next_power_of_2(p.shape[1])),
        "DC": CHANNELS,
        "EXACT": exact_float32(),
        "num_warps": WARPS,
    }


def _states(count: int, p: Tensor) -> Tensor:
    """Room for complex states [count, D, N]."""
    return torch.empty(count, *p.shape, 2, dtype=torch.float32, device=p.device)


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
        segments,
        differentiable,
    ):
        x, cut, start = side_by_side(x), Cut.of(segments, x), _as_real(state)
        maps = (p, _q(log_magnitude, turns), gamma.contiguous(), omega.contiguous())
        y = torch.empty_like(x)
        kept = _states(cut.kept, p) if differentiable else None
        with on_device_of(x):
            sums = cut.sums(x, maps, start, reverse=False)
            forward_kernel[cut.grid(x.shape[2])](
                *(x, *maps, start, sums, y, kept, cut.tiles, cut.parts, x.shape[2], cut.size),
                *(*x.stride()[:2], *y.stride()[:2]),
                **_constants(x, p),
            )
        ctx.save_for_backward(x, *maps, start, kept)
        ctx.cut = cut
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, *maps, start, kept = ctx.saved_tensors
        cut, (channels, ndim) = ctx.cut, maps[0].shape
        grad_y, grad_x = side_by_side(grad_y), torch.empty_like(x)
        grad_start = None if start is None else torch.zeros_like(start)
        shape = (len(cut.parts), channels, 5 * ndim + 1)
        partial = torch.empty(shape, dtype=torch.float64, device=x.device)
        with on_device_of(x):
            sums = cut.sums(grad_y, maps, None, reverse=True)
            # More stages would prefetch the kept states alone, in registers that it has not.
            backward_kernel[cut.grid(channels)](
                *(x, grad_y, *maps, kept, start, sums, grad_x, grad_start, partial),
                *(cut.tiles, cut.parts, channels, cut.size),
                *(*x.stride()[:2], *grad_y.stride()[:2], *grad_x.stride()[:2]),
                **_constants(x, maps[0]),
                num_stages=1,
            )
        total = partial.sum(0)
        grads = total[:, : 3 * ndim].split(ndim, 1)
        grad_gamma = total[:, 3 * ndim : -1].unflatten(1, (-1, 2)).to(maps[2].dtype)
        grad_omega = total[:, -1:].to(maps[3].dtype)
        grad_state = None if start is None else torch.view_as_complex(grad_start)
        return grad_x, *grads, grad_gamma, grad_omega, grad_state, None, None


class Summary(torch.autograd.Function):
    """`scan.Summary`: sum_t q^e x_t of each segment, and for backward sum_t e q^e x_t."""

    @staticmethod
    def forward(ctx, x, log_magnitude, turns, segments):
        x, cut, q = side_by_side(x), Cut.of(segments, x, to_end=True), _q(log_magnitude, turns)
        # p is 1; what it reads out is not asked for.
        maps = (torch.ones_like(turns), q, q, turns)
        sums, weighted = (_states(len(cut.parts), turns) for _ in range(2))
        with on_device_of(x):
            sums_kernel[cut.grid(x.shape[2])](
                *(x, *maps, None, sums, weighted, cut.tiles, cut.parts, x.shape[2], cut.size),
                *x.stride()[:2],
                **_constants(x, turns),
                REVERSE=False,
            )
        sums, weighted = torch.view_as_complex(sums), torch.view_as_complex(weighted)
        if len(sums) > len(segments):
            later = cut.parts[:, 5]
            left = powers(log_magnitude, turns, later).transpose(0, 1)
            weighted = left * (weighted + later[:, None, None] * sums)
            weighted, sums = (
                torch.stack([piece.sum(0) for piece in z.split(cut.pieces)])
                for z in (weighted, left * sums)
            )
        ctx.save_for_backward(x, *maps, weighted)
        ctx.cut, ctx.all = cut, sum(z.length for z in segments) == x.shape[0] * x.shape[1]
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *maps, weighted = ctx.saved_tensors
        cut = ctx.cut
        grad_x = torch.empty_like(x) if ctx.all else torch.zeros_like(x)
        with on_device_of(x):
            summary_backward_kernel[cut.grid(x.shape[2])](
                *(_as_real(grad), *maps, grad_x, cut.tiles, cut.parts, x.shape[2]),
                *grad_x.stride()[:2],
                **_constants(x, maps[0]),
            )
        grad_log = (grad * weighted.conj()).to(torch.complex128).sum(0)
        return grad_x, grad_log.real, 2 * math.pi * grad_log.imag, None


def _q(log_magnitude: Tensor, turns: Tensor) -> Tensor:
    """q as pairs, float64 [D, N, 2]."""
    return torch.view_as_real(torch.polar(log_magnitude.exp(), 2 * math.pi * turns))


def _as_real(state: Tensor | None) -> Tensor | None:
    """Complex [...] as contiguous float32 [..., 2]."""
    return None if state is None else torch.view_as_real(state.resolve_conj().contiguous())


@triton.jit
def _part_and_channels(part_table, D, DC: tl.constexpr):
    """A program's row of the table of parts, and its channels [DC]."""
    blocks = tl.cdiv(D, DC)
    program = tl.program_id(0)
    return part_table + program // blocks * 6, program % blocks * DC + tl.arange(0, DC)


@triton.jit
def _tile(table, tile, T: tl.constexpr, M: tl.constexpr):
    """Of a tile its row, its steps [T, M] and which of them are there, and the state before it."""
    table += tile * 5
    t = tl.arange(0, M)[None] * T + tl.arange(0, T)[:, None]
    step = tl.load(table + 1) + t
    inside = (step >= tl.load(table + 2)) & (step < tl.load(table + 3))
    return tl.load(table), step, inside, tl.load(table + 4)


@triton.jit
def _load(x_ptr, row, step, inside, d, D, x_step, x_batch, EXACT: tl.constexpr):
    """Steps [T, M] of each channel as a factor [DC, T, M], zeros where there are none."""
    at = x_ptr + row.to(tl.int64) * x_batch + (step.to(tl.int64) * x_step)[None] + d[:, None, None]
    x = tl.load(at, mask=(d < D)[:, None, None] & inside[None], other=0.0)
    # TF32 holds a bfloat16.
    return halves(x.to(tl.float32), EXACT and x.dtype == tl.float32)


@triton.jit
def _store(y_ptr, y, row, step, inside, d, D, y_step, y_batch):
    at = y_ptr + row.to(tl.int64) * y_batch + (step.to(tl.int64) * y_step)[None] + d[:, None, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(d < D)[:, None, None] & inside[None])


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
def _entering(real, imag, before, start, at, here, size):
    """The state before a tile: real + i imag, but at a segment's first what it is given, or zero.

    before: Cut.tiles' last column. start: states given for segments, `size` numbers each, or None.
    """
    goes_on = before >= 0
    real, imag = tl.where(goes_on, real, 0.0), tl.where(goes_on, imag, 0.0)
    if start is not None:
        given = (-2 - before).to(tl.int64) * size + at
        given_real, given_imag = load_pair(start, given, here & (before < -1))
        real, imag = real + given_real, imag + given_imag
    return real, imag


@triton.jit
def _of_pieces(sums, first, count, step, a, b, at, here, size):
    """What `count` pieces add to a state in all, from part `first` on in steps of `step`, float32.

    a + ib: float64, what a whole piece leaves of a state.
    """
    real, imag = tl.zeros(a.shape, tl.float64), tl.zeros(a.shape, tl.float64)
    for j in range(0, count):
        real, imag = times(real, imag, a, b)
        more = (first + j * step).to(tl.int64) * size + at
        more_real, more_imag = load_pair(sums, more, here)
        real, imag = real + more_real, imag + more_imag
    return real.to(tl.float32), imag.to(tl.float32)


@kernel
def sums_kernel(
    x_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    start,
    sums,
    weighted,
    tile_table,
    part_table,
    D,
    tiles,
    x_step,
    x_batch,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    """Every piece's share in the state after it, to sums [parts, D, N]: all but a segment's last.

    With `weighted`, of all parts, and there each step times how many of the part come after it.
    REVERSE: x is the gradient of y, and the sums are those of the gradient of the state, in all
    pieces but a segment's first.
    """
    part, d = _part_and_channels(part_table, D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    _within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    here, at = places(d, D, N, NP)
    me = tl.program_id(0) // tl.cdiv(D, DC)
    begin, end = tl.load(part), tl.load(part + 1)
    if weighted is None:
        # Nothing to walk where no other piece needs it.
        end = tl.where(me == tl.load(part + (2 if REVERSE else 3)), begin, end)
    if REVERSE:
        b = -b
        w_real, w_imag = r_real, r_imag
    tile_a, tile_b = power(a, b, M)
    if weighted is not None:
        steps = (T - 1 - tl.arange(0, T)).to(tl.float32)[None, None]
        v_real, v_imag = halves(w_real * steps, EXACT), halves(w_imag * steps, EXACT)
        by_real = tl.zeros([DC, NP], tl.float32)
        by_imag = tl.zeros([DC, NP], tl.float32)
        blocks = T * (M - 1 - tl.arange(0, M)).to(tl.float32)[None, None]
    w_real, w_imag = halves(w_real, EXACT), halves(w_imag, EXACT)
    zero = tl.zeros([DC, NP, M], tl.float32)
    real = tl.zeros([DC, NP], tl.float32)
    imag = tl.zeros([DC, NP], tl.float32)
    for j in range(0, end - begin):
        if REVERSE:
            tile = end - 1 - j
        else:
            tile = begin + j
        row, step, inside, before = _tile(tile_table, tile, T, M)
        if start is not None:
            real, imag = _entering(real, imag, before, start, at, here, D * N)
        x = _load(x_ptr, row, step, inside, d, D, x_step, x_batch, EXACT)
        s_real = product(w_real, x, zero)
        s_imag = product(w_imag, x, zero)
        if weighted is not None:
            more_real = product(v_real, x, s_real * blocks)
            more_imag = product(v_imag, x, s_imag * blocks)
            _, _, more_real, more_imag = scan(more_real, more_imag, real, imag, a, b, M, REVERSE)
            by_real, by_imag = by_real + T * M * real, by_imag + T * M * imag
            by_real, by_imag = _carried(by_real, by_imag, tile_a, tile_b, more_real, more_imag)
        _, _, s_real, s_imag = scan(s_real, s_imag, real, imag, a, b, M, REVERSE)
        real, imag = _carried(real, imag, tile_a, tile_b, s_real, s_imag)
    to = me.to(tl.int64) * D * N + at
    store_pair(sums, to, real, imag, here)
    if weighted is not None:
        store_pair(weighted, to, by_real, by_imag, here)


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
    tile_table,
    part_table,
    D,
    tiles,
    x_step,
    x_batch,
    y_step,
    y_batch,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """y of a part, and the states before tiles to `kept` [., D, N]; start and kept may be None."""
    part, d = _part_and_channels(part_table, D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    within, w_real, w_imag = halves(within, EXACT), halves(w_real, EXACT), halves(w_imag, EXACT)
    r_real, r_imag = transposed(halves(r_real, EXACT)), transposed(halves(r_imag, EXACT))
    zero = tl.zeros([DC, NP, M], tl.float32)
    tile_a, tile_b = power(a, b, M)
    here, at = places(d, D, N, NP)

    me, first = tl.program_id(0) // tl.cdiv(D, DC), tl.load(part + 2)
    piece_a, piece_b = power(tile_a, tile_b, tiles)
    real, imag = _of_pieces(sums, first, me - first, 1, piece_a, piece_b, at, here, D * N)
    for tile in range(tl.load(part), tl.load(part + 1)):
        row, step, inside, before = _tile(tile_table, tile, T, M)
        real, imag = _entering(real, imag, before, start, at, here, D * N)
        x = _load(x_ptr, row, step, inside, d, D, x_step, x_batch, EXACT)
        if kept is not None:
            store_pair(kept, before.to(tl.int64) * D * N + at, real, imag, here & (before >= 0))
        s_real = product(w_real, x, zero)
        s_imag = product(w_imag, x, zero)
        h_real, h_imag, s_real, s_imag = scan(s_real, s_imag, real, imag, a, b, M, False)
        real, imag = _carried(real, imag, tile_a, tile_b, s_real, s_imag)
        y = product(within, x, tl.zeros([DC, T, M], tl.float32))
        y = product(r_real, halves(h_real, EXACT), y)
        y = product(r_imag, halves(h_imag, EXACT), y)
        _store(y_ptr, y, row, step, inside, d, D, y_step, y_batch)


@kernel
def backward_kernel(
    x_ptr,
    grad_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    kept,
    start,
    sums,
    grad_x,
    grad_start,
    partial,
    tile_table,
    part_table,
    D,
    tiles,
    x_step,
    x_batch,
    grad_step,
    grad_batch,
    to_step,
    to_batch,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """grad_x of a part, its share in the parameters' gradients, and those of the given states.

    start and grad_start may be None. partial: float64 [parts, D, 5N + 1] for p, log|q|, q's phase
    in turns, gamma and omega.
    """
    part, d = _part_and_channels(part_table, D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    within, w_real, w_imag, r_real, r_imag, a, b = block_map(*channels, T)
    within, w_real, w_imag = halves(within, EXACT), halves(w_real, EXACT), halves(w_imag, EXACT)
    r_real, r_imag = halves(r_real, EXACT), halves(r_imag, EXACT)
    within, back_real, back_imag = transposed(within), transposed(w_real), transposed(w_imag)
    zero = tl.zeros([DC, NP, M], tl.float32)
    tile_a, tile_b = power(a, b, M)
    here, at = places(d, D, N, NP)

    # The gradient of the state after the part.
    me, last = tl.program_id(0) // tl.cdiv(D, DC), tl.load(part + 3)
    piece_a, piece_b = power(tile_a, tile_b, tiles)
    g_real, g_imag = _of_pieces(sums, last, last - me, -1, piece_a, -piece_b, at, here, D * N)
    to_within = tl.zeros([DC, T, T], tl.float32)
    to_w_real = tl.zeros([DC, NP, T], tl.float32)
    to_w_imag = tl.zeros([DC, NP, T], tl.float32)
    to_r_real = tl.zeros([DC, NP, T], tl.float32)
    to_r_imag = tl.zeros([DC, NP, T], tl.float32)
    to_a = tl.zeros([DC, NP], tl.float32)
    to_b = tl.zeros([DC, NP], tl.float32)
    begin, end = tl.load(part), tl.load(part + 1)
    nothing = tl.minimum(end - begin, 0).to(tl.float32)
    # Maps stay in shared memory, to be taken from there for every product.
    for j in tl.range(0, end - begin, disable_licm=True):
        row, step, inside, before = _tile(tile_table, end - 1 - j, T, M)
        # The gradients of the states after the blocks, and of x.
        grad = _load(grad_ptr, row, step, inside, d, D, grad_step, grad_batch, EXACT)
        s_real = product(r_real, grad, zero)
        s_imag = product(r_imag, grad, zero)
        after_real, after_imag, s_real, s_imag = scan(
            s_real, s_imag, g_real, g_imag, a, -b, M, True
        )
        g_real, g_imag = _carried(g_real, g_imag, tile_a, -tile_b, s_real, s_imag)
        back = product(within, grad, tl.zeros([DC, T, M], tl.float32))
        back = product(back_real, halves(after_real, EXACT), back)
        back = product(back_imag, halves(after_imag, EXACT), back)
        _store(grad_x, back, row, step, inside, d, D, to_step, to_batch)
        if grad_start is not None:
            given = (-2 - before).to(tl.int64) * D * N + at
            store_pair(grad_start, given, g_real, g_imag, here & (before < -1))
        # What comes before a segment's first tile is another's.
        g_real, g_imag = tl.where(before < 0, 0.0, g_real), tl.where(before < 0, 0.0, g_imag)

        # The states before the blocks, and the gradients of the maps.
        x = _load(x_ptr, row, step, inside, d, D, x_step, x_batch, EXACT)
        real, imag = load_pair(kept, before.to(tl.int64) * D * N + at, here & (before >= 0))
        real, imag = _entering(real, imag, before, start, at, here, D * N)
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

    # Loaded anew, from places that look new, not to hold registers through the loop.
    d += tl.minimum(end - begin, 0)
    here, at = places(d, D, N, NP)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    to_p, log_real, log_imag, read_real, read_imag, to_omega = block_map_gradient(
        *(to_within, to_w_real, to_w_imag, to_r_real, to_r_imag, to_a, to_b), *channels, T
    )
    partial += (me.to(tl.int64) * D + d[:, None]) * (5 * N + 1)
    n = tl.arange(0, NP)[None]
    tl.store(partial + n, to_p, mask=here)
    tl.store(partial + N + n, log_real, mask=here)
    tl.store(partial + 2 * N + n, 6.283185307179586 * log_imag, mask=here)
    store_pair(partial + 3 * N, n, read_real * N**-0.5, read_imag * N**-0.5, here)
    tl.store(partial + 5 * N + tl.zeros([1, 1], tl.int32), to_omega[:, None], mask=(d < D)[:, None])


@kernel
def summary_backward_kernel(
    grad,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    grad_x,
    tile_table,
    part_table,
    D,
    to_step,
    to_batch,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """grad_x of a part, from the gradients of the segments' sums, grad [S, D, N]."""
    part, d = _part_and_channels(part_table, D, DC)
    channels = load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N, NP)
    _within, w_real, w_imag, _r_real, _r_imag, a, b = block_map(*channels, T)
    w_real, w_imag = transposed(halves(w_real, EXACT)), transposed(halves(w_imag, EXACT))
    here, at = places(d, D, N, NP)
    zero = tl.zeros([DC, NP, M], tl.float32)
    tile_a, tile_b = power(a, b, M)
    # The gradient of the state after the part.
    left_real, left_imag = power(channels[1], -channels[2], tl.load(part + 5))
    real, imag = load_pair(grad, tl.load(part + 4).to(tl.int64) * D * N + at, here)
    real, imag = times(real.to(tl.float64), imag.to(tl.float64), left_real, left_imag)
    real, imag = real.to(tl.float32), imag.to(tl.float32)
    begin, end = tl.load(part), tl.load(part + 1)
    for j in range(0, end - begin):
        row, step, inside, _before = _tile(tile_table, end - 1 - j, T, M)
        after_real, after_imag, s_real, s_imag = scan(zero, zero, real, imag, a, -b, M, True)
        real, imag = _carried(real, imag, tile_a, -tile_b, s_real, s_imag)
        back = product(w_real, halves(after_real, EXACT), tl.zeros([DC, T, M], tl.float32))
        back = product(w_imag, halves(after_imag, EXACT), back)
        _store(grad_x, back, row, step, inside, d, D, to_step, to_batch)
