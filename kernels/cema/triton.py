"""CEMA in Triton: the block scan of `portable`, with T = 16 steps a block, on tensor cores.

Time is cut into segments of at most SEGMENT blocks; a (batch row, segment) is a lane, and a
program walks LANES lanes at once for CHANNELS channels. Per block and channel, with x [T, lanes]
and the states h [N, lanes] (real and imaginary parts apart),

    y = K x + R h,   h = q^T h + W x

which are batched 16 x 16 x 16 products; the states stay in registers. A first walk gives what
every segment adds to a zero state, a scan over the segments in float64 gives the state each of
them starts with, and a second walk gives y. So x is read twice and y written once; what else moves
is 2N numbers a segment and channel, and the maps K, R, W.

Backward is the same walk over the gradients with the maps transposed and time reversed; it also
sums the gradient of W, which needs x and the gradient of the states. The gradients of K and R need
the states, so another walk goes forward. It carries u = dh/d(q^T) too, u = q^T u + h, and so finds
the gradient of q^T without the states' gradients at hand. The maps' gradients are summed over the
programs in a fixed order, and torch carries them on to the parameters.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import on_device_of
from .portable import _recurrence, block_map, cema_portable, coefficients, powers

BLOCK = 16
LANES = 16
CHANNELS = 8
# Blocks in a segment at most: q^T is applied in float32 within one.
SEGMENT = 64
# Programs that keep a card busy; with fewer, segments are made shorter.
PROGRAMS = 512


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
    params = (alpha, delta, theta, gamma, omega)
    batch, length, channels = x.shape
    whole = length - length % BLOCK
    if whole == 0 or batch == 0 or channels == 0:
        return cema_portable(x, *params, state, return_state)
    if state is None:
        state = torch.zeros(batch, channels, alpha.shape[1], dtype=torch.complex64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        if whole == length:
            y, end = _Cema.apply(x, *params, state, return_state)
            return y, end
        # The few steps that fill no block, one at a time.
        y, end = _Cema.apply(x[:, :whole], *params, state, True)
        y_rest, end = _recurrence(x[:, whole:], *params, end)
        return torch.cat([y, y_rest], dim=1), end if return_state else None


class _Maps(NamedTuple):
    """What a walk multiplies by, float32 and contiguous, N padded to a power of two.

    within: [D, T, T]; write, twice [D, N, T]; read, twice [D, T, N]; turn: q^T as real and
    imaginary part, then what float32 lost of them, [4, D, N].
    """

    within: Tensor
    write_real: Tensor
    write_imag: Tensor
    read_real: Tensor
    read_imag: Tensor
    turn: Tensor

    @classmethod
    def of(cls, block_map: Tensor, q_block: Tensor, padded: int) -> "_Maps":
        within = block_map[:, :BLOCK, :BLOCK].contiguous()
        missing = padded - q_block.shape[1]
        write = F.pad(block_map[:, BLOCK:, :BLOCK], (0, 0, 0, 2 * missing))
        read = F.pad(block_map[:, :BLOCK, BLOCK:], (0, 2 * missing))
        exact = F.pad(torch.stack([q_block.real, q_block.imag]), (0, missing))
        high = exact.float()
        turn = torch.cat([high, (exact - high).float()])
        parts = (write[:, 0::2], write[:, 1::2], read[..., 0::2], read[..., 1::2])
        return cls(within, *(part.contiguous() for part in parts), turn)

    def transposed(self) -> "_Maps":
        """The maps that carry gradients back."""
        within, *parts = (part.mT.contiguous() for part in self[:5])
        write_real, write_imag, read_real, read_imag = parts
        turn = self.turn * self.turn.new_tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
        return _Maps(within, read_real, read_imag, write_real, write_imag, turn)


class Walk(NamedTuple):
    """How [batch, length, D] is cut: `segments` a row, each of `segment` blocks but the last."""

    batch: int
    channels: int
    padded: int
    blocks: int
    segment: int
    segments: int

    @classmethod
    def of(cls, x: Tensor, ndim: int) -> "Walk":
        batch, length, channels = x.shape
        blocks = length // BLOCK
        lanes = LANES * max(1, PROGRAMS // triton.cdiv(channels, CHANNELS))
        segment = max(1, min(SEGMENT, batch * blocks // lanes))
        padded = max(16, triton.next_power_of_2(ndim))
        return cls(batch, channels, padded, blocks, segment, triton.cdiv(blocks, segment))

    @property
    def lanes(self) -> int:
        return self.batch * self.segments

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.channels, CHANNELS), triton.cdiv(self.lanes, LANES)

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        exact = torch.get_float32_matmul_precision() == "highest"
        return {
            "T": BLOCK,
            "N": self.padded,
            "DC": CHANNELS,
            "M": LANES,
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": CHANNELS,
        }

    def states(self, x: Tensor, parts: int) -> Tensor:
        """Room for a state (2 parts) and its derivative (2 more) of every lane."""
        shape = (parts, self.lanes, self.channels, self.padded)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def pairs(self, state: Tensor) -> Tensor:
        """Complex [batch, D, N] as float32 [2, batch, D, padded]."""
        parts = torch.stack([state.real, state.imag]).float()
        return F.pad(parts, (0, self.padded - state.shape[-1]))

    def walk(
        self,
        x: Tensor,
        maps: _Maps,
        starts: Tensor | None,
        ends: Tensor | None = None,
        y: Tensor | None = None,
        other: Tensor | None = None,
        partial: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Launch walk_kernel; without starts the lanes start at zero. See there."""
        out, other_x = x if y is None else y, x if other is None else other
        derivative = ends is not None and ends.shape[0] == 4
        walk_kernel[self.grid](
            *(x, out, other_x, *maps),
            *(maps.turn if starts is None else starts, maps.turn if ends is None else ends),
            maps.turn if partial is None else partial,
            *(self.channels, self.lanes, self.segments, self.segment, self.blocks),
            *(*x.stride()[:2], *out.stride()[:2], *other_x.stride()[:2]),
            **self.constants(),
            REVERSE=reverse,
            STARTS=starts is not None,
            ENDS=ends is not None,
            DERIVATIVE=derivative,
            OUTPUT=y is not None,
            GRADIENT=partial is not None,
        )

    def scan(self, ends: Tensor, first: Tensor, q: tuple[Tensor, Tensor], reverse: bool) -> Tensor:
        """Turn what each segment adds into the states they start with, in place.

        q: (q^T)^m and m (q^T)^(m-1) as float64 [4, D, N], for a segment of the usual length and
        for the last one. Returns what is there after all: [parts, batch, D, N].
        """
        parts = ends.shape[0]
        shape = (parts, self.batch, self.channels, self.padded)
        last = torch.empty(shape, dtype=torch.float32, device=ends.device)
        block = 32
        scan_kernel[(triton.cdiv(self.channels, block), self.batch)](
            *(ends, first, last, *q, self.channels, self.segments, self.lanes, self.batch),
            N=self.padded,
            DC=block,
            REVERSE=reverse,
            DERIVATIVE=parts == 4,
            num_warps=4,
        )
        return last

    def turns(self, log_magnitude: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """For `scan`, from the results of `coefficients`."""
        tables = []
        for count in (self.segment, self.blocks - (self.segments - 1) * self.segment):
            exponents = torch.tensor([count, count - 1], device=turns.device) * BLOCK
            whole, less = powers(log_magnitude, turns, exponents, torch.float64).unbind(1)
            less = count * less
            table = torch.stack([whole.real, whole.imag, less.real, less.imag])
            tables.append(F.pad(table, (0, self.padded - table.shape[-1])))
        return tables[0], tables[1]


class _Cema(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, delta, theta, gamma, omega, state, return_state):  # noqa: ANN001, ANN205
        x = _rows(x)
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state)
        ctx.return_state = return_state
        walk = Walk.of(x, alpha.shape[1])
        with on_device_of(x):
            block_map, q_block, log_magnitude, turns = _build(alpha, delta, theta, gamma, omega)
            maps = _Maps.of(block_map, q_block, walk.padded)
            states = walk.states(x, 2)
            walk.walk(x, maps, None, ends=states)
            tables = walk.turns(log_magnitude, turns)
            end = walk.scan(states, walk.pairs(state), tables, reverse=False)
            y = torch.empty_like(x)
            walk.walk(x, maps, states, y=y)
        return y, _complex(end, alpha.shape[1]) if return_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_end):  # noqa: ANN001, ANN205
        x, *params, state = ctx.saved_tensors
        ndim = state.shape[-1]
        grad_y = _rows(grad_y)
        walk = Walk.of(x, ndim)
        with on_device_of(x), torch.autocast(x.device.type, enabled=False):
            leaves = [a.detach().requires_grad_() for a in params]
            with torch.enable_grad():
                block_map, q_block, log_magnitude, turns = _build(*leaves)
            with torch.no_grad():
                maps = _Maps.of(block_map.detach(), q_block, walk.padded)
                tables = walk.turns(log_magnitude, turns)
            if not ctx.return_state:
                grad_end = torch.zeros_like(state)
            grad_end = walk.pairs(grad_end.resolve_conj())

            back = maps.transposed()
            gradients = walk.states(x, 2)
            walk.walk(grad_y, back, None, ends=gradients, reverse=True)
            conjugate = [t * t.new_tensor([1.0, -1, 1, -1])[:, None, None] for t in tables]
            grad_state = walk.scan(gradients, grad_end, tuple(conjugate), reverse=True)
            grad_x = torch.empty_like(x)
            programs = walk.grid[1]
            shape = (programs, walk.channels)
            # In the order write (real, imaginary), within, read (real, imaginary), q^T.
            t, n = BLOCK, walk.padded
            sums = [torch.empty(*shape, k, device=x.device) for k in (2 * n * t, t * t + 2 * t * n)]
            sums.append(torch.empty(*shape, 2 * n, device=x.device))
            walk.walk(grad_y, back, gradients, y=grad_x, other=x, partial=sums[0], reverse=True)

            states = walk.states(x, 4)
            walk.walk(x, maps, None, ends=states)
            first = torch.cat([walk.pairs(state), torch.zeros_like(grad_end)])
            end = walk.scan(states, first, tables, reverse=False)
            gradient_kernel[walk.grid](
                *(x, grad_y, *maps[1:], states, sums[1], sums[2]),
                *(walk.channels, walk.lanes, walk.segments, walk.segment, walk.blocks),
                *(*x.stride()[:2], *grad_y.stride()[:2]),
                **walk.constants(),
                # More tiles on their way would not fit the registers.
                num_stages=2,
            )
            write, rest, turn = (part.sum(0) for part in sums)
            # The end state's share: it holds dq^T times the derivative.
            u = torch.complex(end[2], end[3])
            through_end = (torch.complex(*grad_end) * u.conj()).sum(0)
            turn = turn.unflatten(1, (2, n)) + torch.view_as_real(through_end).mT
            grad_map = _join(write, rest, turn, ndim)
            grads = torch.autograd.grad(block_map, leaves, grad_map)
        return grad_x, *grads, _complex(grad_state, ndim), None


def _build(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The map of a block [D, T+2N, T+2N], q^T in double, and log|q| and phase of q."""
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    whole = block_map(p, log_magnitude, turns, gamma, omega, BLOCK)
    log_magnitude, turns = log_magnitude.detach(), turns.detach()
    steps = torch.tensor([BLOCK], device=alpha.device)
    q_block = powers(log_magnitude, turns, steps, torch.float64)[:, 0]
    return whole, q_block, log_magnitude, turns


def _join(write: Tensor, rest: Tensor, turn: Tensor, ndim: int) -> Tensor:
    """The gradient of the map of a block from those of its parts."""
    t = BLOCK
    channels, n = write.shape[0], write.shape[1] // (2 * t)
    grad = write.new_zeros(channels, t + 2 * ndim, t + 2 * ndim)
    grad[:, :t, :t] = rest[:, : t * t].view(channels, t, t)
    read = rest[:, t * t :].view(channels, 2, t, n)[..., :ndim]
    grad[:, :t, t:] = read.permute(0, 2, 3, 1).flatten(2)
    grad[:, t:, :t] = write.view(channels, 2, n, t)[:, :, :ndim].transpose(1, 2).flatten(1, 2)
    # Multiplication by q^T = a + ib stands there as [[a, -b], [b, a]]: one place each will do.
    real = torch.arange(t, t + 2 * ndim, 2, device=grad.device)
    grad[:, real, real] = turn[:, 0, :ndim]
    grad[:, real + 1, real] = turn[:, 1, :ndim]
    return grad


def _rows(x: Tensor) -> Tensor:
    """With channels side by side, and no stride of an expanded tensor."""
    return x if x.stride(-1) == 1 and x.stride(1) > 0 else x.contiguous()


def _complex(parts: Tensor, ndim: int) -> Tensor:
    return torch.complex(parts[0, ..., :ndim], parts[1, ..., :ndim])


@triton.jit
def _steps(x_ptr, lane, block, there, d, x_batch, x_step, segments, T: tl.constexpr):  # noqa: ANN001, ANN202
    """Pointers to a block of each lane, [DC, T, M]."""
    first = (lane // segments).to(tl.int64) * x_batch + block.to(tl.int64) * T * x_step
    i = tl.arange(0, T).to(tl.int64)
    return x_ptr + d[:, None, None] + (i * x_step)[None, :, None] + first[None, None]


@triton.jit
def _matrix(pointer, d, D, A: tl.constexpr, B: tl.constexpr):  # noqa: ANN001, ANN202
    """One of the maps, [DC, A, B]."""
    at = (
        d[:, None, None] * (A * B)
        + tl.arange(0, A)[None, :, None] * B
        + tl.arange(0, B)[None, None]
    )
    return tl.load(pointer + at, mask=(d < D)[:, None, None], other=0.0)


@triton.jit
def _turned(real, imag, a, b, a_low, b_low):  # noqa: ANN001, ANN202
    """(a + ib) times a state, with what a and b lost to rounding."""
    turned_real = a * real - b * imag + (a_low * real - b_low * imag)
    return turned_real, a * imag + b * real + (a_low * imag + b_low * real)


@triton.jit
def walk_kernel(
    x_ptr,  # noqa: ANN001
    y_ptr,  # noqa: ANN001
    other_ptr,  # noqa: ANN001
    within_ptr,  # noqa: ANN001
    write_real_ptr,  # noqa: ANN001
    write_imag_ptr,  # noqa: ANN001
    read_real_ptr,  # noqa: ANN001
    read_imag_ptr,  # noqa: ANN001
    turn_ptr,  # noqa: ANN001
    starts,  # noqa: ANN001
    ends,  # noqa: ANN001
    partial,  # noqa: ANN001
    D,  # noqa: ANN001
    lanes,  # noqa: ANN001
    segments,  # noqa: ANN001
    segment,  # noqa: ANN001
    blocks,  # noqa: ANN001
    x_batch,  # noqa: ANN001
    x_step,  # noqa: ANN001
    y_batch,  # noqa: ANN001
    y_step,  # noqa: ANN001
    other_batch,  # noqa: ANN001
    other_step,  # noqa: ANN001
    T: tl.constexpr,
    N: tl.constexpr,
    DC: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    OUTPUT: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    """Walk M lanes' segments; OUTPUT gives y, ENDS the state after (with dh/dq^T: DERIVATIVE).

    GRADIENT, for a walk over gradients, sums those of write: state times `other` (the inputs).
    """
    d = tl.program_id(0) * DC + tl.arange(0, DC)
    lane = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.arange(0, N)
    there = (d < D)[:, None, None] & (lane < lanes)[None, None]
    at_state = lane.to(tl.int64)[None, None] * (D * N) + d[:, None, None] * N + n[None, :, None]
    part = lanes * tl.cast(D * N, tl.int64)
    at_turn = d[:, None, None] * N + n[None, :, None]
    a = tl.load(turn_ptr + at_turn, mask=(d < D)[:, None, None], other=0.0)
    b = tl.load(turn_ptr + D * N + at_turn, mask=(d < D)[:, None, None], other=0.0)
    a_low = tl.load(turn_ptr + 2 * D * N + at_turn, mask=(d < D)[:, None, None], other=0.0)
    b_low = tl.load(turn_ptr + 3 * D * N + at_turn, mask=(d < D)[:, None, None], other=0.0)
    write_real = _matrix(write_real_ptr, d, D, N, T)
    write_imag = _matrix(write_imag_ptr, d, D, N, T)
    if OUTPUT:
        within = _matrix(within_ptr, d, D, T, T)
        read_real = _matrix(read_real_ptr, d, D, T, N)
        read_imag = _matrix(read_imag_ptr, d, D, T, N)
    if STARTS:
        real = tl.load(starts + at_state, mask=there, other=0.0)
        imag = tl.load(starts + part + at_state, mask=there, other=0.0)
    else:
        real = tl.zeros([DC, N, M], tl.float32)
        imag = tl.zeros([DC, N, M], tl.float32)
    if DERIVATIVE:
        u_real = tl.zeros([DC, N, M], tl.float32)
        u_imag = tl.zeros([DC, N, M], tl.float32)
    if GRADIENT:
        grad_real = tl.zeros([DC, N, T], tl.float32)
        grad_imag = tl.zeros([DC, N, T], tl.float32)

    first = (lane % segments) * segment
    count = tl.minimum(segment, blocks - first)
    for j in range(0, segment):
        if REVERSE:
            block = first + count - 1 - j
        else:
            block = first + j
        valid = there & (j < count)[None, None]
        at = _steps(x_ptr, lane, block, valid, d, x_batch, x_step, segments, T)
        x = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        if OUTPUT:
            y = tl.dot(within, x, input_precision=PRECISION)
            y = tl.dot(read_real, real, y, input_precision=PRECISION)
            y = tl.dot(read_imag, imag, y, input_precision=PRECISION)
            at = _steps(y_ptr, lane, block, valid, d, y_batch, y_step, segments, T)
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=valid)
        if GRADIENT:
            at = _steps(other_ptr, lane, block, valid, d, other_batch, other_step, segments, T)
            other = tl.permute(tl.load(at, mask=valid, other=0.0).to(tl.float32), (0, 2, 1))
            grad_real = tl.dot(real, other, grad_real, input_precision=PRECISION)
            grad_imag = tl.dot(imag, other, grad_imag, input_precision=PRECISION)
        if DERIVATIVE:
            next_real, next_imag = _turned(u_real, u_imag, a, b, a_low, b_low)
            u_real = tl.where(valid, next_real + real, u_real)
            u_imag = tl.where(valid, next_imag + imag, u_imag)
        next_real, next_imag = _turned(real, imag, a, b, a_low, b_low)
        next_real = tl.dot(write_real, x, next_real, input_precision=PRECISION)
        next_imag = tl.dot(write_imag, x, next_imag, input_precision=PRECISION)
        real = tl.where(valid, next_real, real)
        imag = tl.where(valid, next_imag, imag)

    if ENDS:
        tl.store(ends + at_state, real, mask=there)
        tl.store(ends + part + at_state, imag, mask=there)
    if DERIVATIVE:
        tl.store(ends + 2 * part + at_state, u_real, mask=there)
        tl.store(ends + 3 * part + at_state, u_imag, mask=there)
    if GRADIENT:
        to = partial + tl.program_id(1).to(tl.int64) * D * (2 * N * T)
        at = d[:, None, None] * (2 * N * T) + n[None, :, None] * T + tl.arange(0, T)[None, None]
        tl.store(to + at, grad_real, mask=(d < D)[:, None, None])
        tl.store(to + N * T + at, grad_imag, mask=(d < D)[:, None, None])


@triton.jit
def scan_kernel(
    states,  # noqa: ANN001
    first,  # noqa: ANN001
    last,  # noqa: ANN001
    usual,  # noqa: ANN001
    final,  # noqa: ANN001
    D,  # noqa: ANN001
    segments,  # noqa: ANN001
    lanes,  # noqa: ANN001
    batch,  # noqa: ANN001
    N: tl.constexpr,
    DC: tl.constexpr,
    REVERSE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
) -> None:
    """Replace what each segment adds to a zero state by the state before it; see `Walk.scan`."""
    d = tl.program_id(0) * DC + tl.arange(0, DC)
    row = tl.program_id(1).to(tl.int64)
    there = (d < D)[:, None] & (tl.arange(0, N) < N)[None]
    at = d[:, None] * N + tl.arange(0, N)[None]
    plane = batch * tl.cast(D * N, tl.int64)
    part = lanes * tl.cast(D * N, tl.int64)
    real = tl.load(first + row * D * N + at, mask=there, other=0.0).to(tl.float64)
    imag = tl.load(first + plane + row * D * N + at, mask=there, other=0.0).to(tl.float64)
    u_real = tl.zeros([DC, N], tl.float64)
    u_imag = tl.zeros([DC, N], tl.float64)
    for j in range(0, segments):
        if REVERSE:
            s = segments - 1 - j
        else:
            s = j
        # The last segment in time may be shorter.
        short = s == segments - 1
        a = tl.load((final if short else usual) + at, mask=there, other=0.0)
        b = tl.load((final if short else usual) + D * N + at, mask=there, other=0.0)
        lane = states + (row * segments + s) * D * N + at
        add_real = tl.load(lane, mask=there, other=0.0)
        add_imag = tl.load(lane + part, mask=there, other=0.0)
        tl.store(lane, real.to(tl.float32), mask=there)
        tl.store(lane + part, imag.to(tl.float32), mask=there)
        if DERIVATIVE:
            c = tl.load((final if short else usual) + 2 * D * N + at, mask=there, other=0.0)
            e = tl.load((final if short else usual) + 3 * D * N + at, mask=there, other=0.0)
            more_real = tl.load(lane + 2 * part, mask=there, other=0.0)
            more_imag = tl.load(lane + 3 * part, mask=there, other=0.0)
            tl.store(lane + 2 * part, u_real.to(tl.float32), mask=there)
            tl.store(lane + 3 * part, u_imag.to(tl.float32), mask=there)
            next_real = a * u_real - b * u_imag + (c * real - e * imag) + more_real
            u_imag = a * u_imag + b * u_real + (c * imag + e * real) + more_imag
            u_real = next_real
        next_real = a * real - b * imag + add_real
        imag = a * imag + b * real + add_imag
        real = next_real
    to = last + row * D * N + at
    tl.store(to, real.to(tl.float32), mask=there)
    tl.store(to + plane, imag.to(tl.float32), mask=there)
    if DERIVATIVE:
        tl.store(to + 2 * plane, u_real.to(tl.float32), mask=there)
        tl.store(to + 3 * plane, u_imag.to(tl.float32), mask=there)


@triton.jit
def gradient_kernel(
    x_ptr,  # noqa: ANN001
    grad_ptr,  # noqa: ANN001
    write_real_ptr,  # noqa: ANN001
    write_imag_ptr,  # noqa: ANN001
    read_real_ptr,  # noqa: ANN001
    read_imag_ptr,  # noqa: ANN001
    turn_ptr,  # noqa: ANN001
    starts,  # noqa: ANN001
    partial,  # noqa: ANN001
    partial_turn,  # noqa: ANN001
    D,  # noqa: ANN001
    lanes,  # noqa: ANN001
    segments,  # noqa: ANN001
    segment,  # noqa: ANN001
    blocks,  # noqa: ANN001
    x_batch,  # noqa: ANN001
    x_step,  # noqa: ANN001
    grad_batch,  # noqa: ANN001
    grad_step,  # noqa: ANN001
    T: tl.constexpr,
    N: tl.constexpr,
    DC: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """M lanes' share in the gradients of within [T, T], read (twice [T, N]) and q^T (twice [N])."""
    d = tl.program_id(0) * DC + tl.arange(0, DC)
    lane = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.arange(0, N)
    t = tl.arange(0, T)
    here = (d < D)[:, None, None]
    there = here & (lane < lanes)[None, None]
    at_state = lane.to(tl.int64)[None, None] * (D * N) + d[:, None, None] * N + n[None, :, None]
    part = lanes * tl.cast(D * N, tl.int64)
    at_turn = d[:, None, None] * N + n[None, :, None]
    a = tl.load(turn_ptr + at_turn, mask=here, other=0.0)
    b = tl.load(turn_ptr + D * N + at_turn, mask=here, other=0.0)
    a_low = tl.load(turn_ptr + 2 * D * N + at_turn, mask=here, other=0.0)
    b_low = tl.load(turn_ptr + 3 * D * N + at_turn, mask=here, other=0.0)
    write_real = _matrix(write_real_ptr, d, D, N, T)
    write_imag = _matrix(write_imag_ptr, d, D, N, T)
    read_real = tl.permute(_matrix(read_real_ptr, d, D, T, N), (0, 2, 1))
    read_imag = tl.permute(_matrix(read_imag_ptr, d, D, T, N), (0, 2, 1))
    real = tl.load(starts + at_state, mask=there, other=0.0)
    imag = tl.load(starts + part + at_state, mask=there, other=0.0)
    u_real = tl.load(starts + 2 * part + at_state, mask=there, other=0.0)
    u_imag = tl.load(starts + 3 * part + at_state, mask=there, other=0.0)
    within = tl.zeros([DC, T, T], tl.float32)
    to_real = tl.zeros([DC, T, N], tl.float32)
    to_imag = tl.zeros([DC, T, N], tl.float32)
    to_a = tl.zeros([DC, N, M], tl.float32)
    to_b = tl.zeros([DC, N, M], tl.float32)

    first = (lane % segments) * segment
    count = tl.minimum(segment, blocks - first)
    for j in range(0, segment):
        # Past its segment a lane has neither inputs nor gradients, and its state is not used.
        valid = there & (j < count)[None, None]
        at = _steps(x_ptr, lane, first + j, valid, d, x_batch, x_step, segments, T)
        x = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        at = _steps(grad_ptr, lane, first + j, valid, d, grad_batch, grad_step, segments, T)
        grad = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        within = tl.dot(grad, tl.permute(x, (0, 2, 1)), within, input_precision=PRECISION)
        to_real = tl.dot(grad, tl.permute(real, (0, 2, 1)), to_real, input_precision=PRECISION)
        to_imag = tl.dot(grad, tl.permute(imag, (0, 2, 1)), to_imag, input_precision=PRECISION)
        r_real = tl.dot(read_real, grad, input_precision=PRECISION)
        r_imag = tl.dot(read_imag, grad, input_precision=PRECISION)
        to_a += r_real * u_real + r_imag * u_imag
        to_b += r_imag * u_real - r_real * u_imag
        next_real, next_imag = _turned(u_real, u_imag, a, b, a_low, b_low)
        u_real = next_real + real
        u_imag = next_imag + imag
        next_real, next_imag = _turned(real, imag, a, b, a_low, b_low)
        real = tl.dot(write_real, x, next_real, input_precision=PRECISION)
        imag = tl.dot(write_imag, x, next_imag, input_precision=PRECISION)

    size: tl.constexpr = T * T + 2 * T * N
    to = partial + tl.program_id(1).to(tl.int64) * D * size + d[:, None, None] * size
    tl.store(to + t[None, :, None] * T + t[None, None], within, mask=here)
    at = T * T + t[None, :, None] * N + n[None, None]
    tl.store(to + at, to_real, mask=here)
    tl.store(to + T * N + at, to_imag, mask=here)
    to = partial_turn + tl.program_id(1).to(tl.int64) * D * (2 * N) + d[:, None] * (2 * N) + n[None]
    tl.store(to, tl.sum(to_a, 2), mask=(d < D)[:, None])
    tl.store(to + N, tl.sum(to_b, 2), mask=(d < D)[:, None])
