"""CEMA as a block scan in plain torch, for any device.

Write h for the state as 2N real numbers per channel (real and imaginary parts interleaved). A
block of T steps is one linear map per channel,

    [ y_block ]   [ K  R ] [ x_block ]
    [ h_after ] = [ W  Q ] [ h_before ]

with K[i, j] = Re(sum_n gamma_n p_n q_n^(i-j)) / sqrt(N) for j <= i (plus omega on the diagonal),
R the response of the outputs to the incoming state, W what the inputs leave in the state, and Q
the multiplication by q^T. So the whole is: W x for every block (a GEMM batched over channels), a
scan over the L/T states, and [K R] [x; h] for every block. The backward pass is the transposed
map with time reversed; the gradient of the map itself is one more GEMM, and ordinary autograd
carries it on to the parameters.

Channels are independent and are worked through in groups, and these in segments of time, so that
the rearranged copies of x stay in the cache and take a fraction of x's memory; backward saves
nothing but the inputs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Steps in a block, halved where there are so few in all that building the maps costs most.
BLOCK = 32
FEW_STEPS = 1024
# Up to this length the plain recurrence costs less than building a block's map.
SHORT = 16
# Channels whose maps exist at a time, and elements of x that a CPU rearranges at a time.
GROUP_CHANNELS = 256
SEGMENT_ELEMENTS = 1 << 18


def coefficients(alpha: Tensor, delta: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence's p and, in polar form, its q: (p, log|q|, phase of q in turns).

    p_n = sigmoid(alpha_n) and q_n = (1 - sigmoid(alpha_n) sigmoid(delta_n))
    exp(2 pi i n sigmoid(theta) / N), n = 1..N (arXiv 2404.08801, section 3.1). alpha, delta:
    [D, N, 1]; theta: [D, 1, 1]. All results are float64 [D, N]: powers up to the sequence's
    length are taken of q, and a saturated sigmoid loses its gradient's digits in float32.
    """
    alpha, delta, theta = alpha.double(), delta.double(), theta.double()
    # 1 - ab = (1 - a) + a (1 - b): exact also where |q| is tiny, and never the log of zero.
    log_magnitude = torch.logaddexp(
        F.logsigmoid(-alpha), F.logsigmoid(alpha) + F.logsigmoid(-delta)
    )
    ndim = alpha.shape[1]
    n = torch.arange(1, ndim + 1, dtype=torch.float64, device=alpha.device)
    turns = torch.sigmoid(theta)[..., 0] * (n / ndim)
    return torch.sigmoid(alpha)[..., 0], log_magnitude[..., 0], turns


def powers(
    log_magnitude: Tensor, turns: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q^t for every t in exponents [M], from the results of coefficients [D, N]: complex [D, M, N].

    dtype is that of the real and imaginary parts. Phases are reduced in float64 first, so t may
    be as large as a sequence is long.
    """
    t = exponents.to(torch.float64)[:, None]
    phase = t * turns[:, None]
    phase = phase - phase.detach().round()
    magnitude = (t * log_magnitude[:, None]).to(dtype).exp()
    angle = (2 * math.pi * phase).to(dtype)
    # torch.polar's backward divides by the magnitude, which gives NaN where that is denormal.
    return torch.complex(magnitude * angle.cos(), magnitude * angle.sin())


def cema_portable(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema`: same arguments, unchecked."""
    batch, length, channels = x.shape
    if state is None:
        shape = (batch, channels, alpha.shape[1])
        state = torch.zeros(shape, dtype=_compute_dtype(x).to_complex(), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        if length <= SHORT:
            y, state_out = _recurrence(x, alpha, delta, theta, gamma, omega, state)
        else:
            y, state_out = _BlockScan.apply(
                x, alpha, delta, theta, gamma, omega, state, return_state
            )
    return y, state_out if return_state else None


def cema_response_portable(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema_response`, unchecked."""
    with torch.autocast(state.device.type, enabled=False):
        # Backward saves the arguments alone: powers of every block take more than the result.
        return checkpoint(
            *(_response, state, alpha, delta, theta, gamma, length),
            use_reentrant=False,
            preserve_rng_state=False,
        )


def _response(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """y_t = Re(readout q^(t+1) h), q^(t+1) split into q^(block start) and q^(step + 1)."""
    batch, channels, ndim = state.shape
    real = state.dtype.to_real()
    block = min(BLOCK, length)
    blocks = -(-length // block)
    _, log_magnitude, turns = coefficients(alpha, delta, theta)
    starts = torch.arange(blocks, device=state.device) * block
    steps = torch.arange(1, block + 1, device=state.device)
    # [batch, D, blocks, N]: the state that every block starts with.
    h = state[:, :, None] * powers(log_magnitude, turns, starts, real)
    readout = torch.view_as_complex(gamma.contiguous())[:, None] / math.sqrt(ndim)
    readout = readout * powers(log_magnitude, turns, steps, real)
    # Re(c h) = Re(c) Re(h) - Im(c) Im(h), as one product per channel.
    response = torch.view_as_real(readout.conj().resolve_conj()).flatten(2)
    h = torch.view_as_real(h).flatten(3).transpose(0, 1).flatten(1, 2)
    y = torch.bmm(h, response.mT).view(channels, batch, blocks * block)
    return y.permute(1, 2, 0)[:, :length]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def recurrence_weights(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and gamma / sqrt(N) of a step, [D, N]: real, complex128 and complex."""
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    # q and the products with it in double: decoding applies q once per token, and a rounded q
    # would compound over the tokens.
    q = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)
    readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(alpha.shape[1])
    return p.to(gamma.dtype), q, readout


def _recurrence(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The equations step by step, under ordinary autograd; arguments as `cema`'s."""
    if x.shape[1] == 0:
        return x.clone(), state
    p, q, readout = recurrence_weights(alpha, delta, theta, gamma)
    outputs = []
    for x_t in x.to(p.dtype).unbind(1):
        state = (q * state).to(readout.dtype) + p * x_t[..., None]
        outputs.append((readout * state).real.sum(-1) + omega[:, 0] * x_t)
    return torch.stack(outputs, dim=1).to(x.dtype), state


class _BlockScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, delta, theta, gamma, omega, state, return_state):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state)
        ctx.return_state = return_state
        y = torch.empty_like(x)
        state_out = torch.empty_like(state) if return_state else None
        for group in _channel_groups(x.shape[2]):
            maps = _Maps.of(x, [a[group] for a in (alpha, delta, theta, gamma, omega)])
            cut = _Cut(x, maps)
            h = state[:, group].to(torch.complex128)
            z = None
            for steps in cut.segments:
                z = cut.gather(x[:, steps, group], z)
                z[..., cut.block :], h = cut.states(z, h)
                outputs = torch.bmm(cut.rows(z), maps.map[:, : cut.block].mT)
                cut.scatter(outputs, y[:, steps, group])
            if return_state:
                end = torch.bmm(z[-1].transpose(0, 1), maps.end_map.mT)
                state_out[:, group] = _as_complex(end).transpose(0, 1)
        return y, state_out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state_out):  # noqa: ANN001, ANN205
        x, alpha, delta, theta, gamma, omega, state = ctx.saved_tensors
        params = (alpha, delta, theta, gamma, omega)
        grad_x, grad_state = torch.empty_like(x), torch.empty_like(state)
        grad_params = [torch.empty_like(a) for a in params]
        with torch.autocast(x.device.type, enabled=False):
            for group in _channel_groups(x.shape[2]):
                leaves = [a[group].detach().requires_grad_() for a in params]
                with torch.enable_grad():
                    maps = _Maps.of(x, leaves)
                cut = _Cut(x, maps)
                grad_end = grad_state_out[:, group] if ctx.return_state else None
                grad_map, grad_end_map = cut.backward(
                    *(x[..., group], state[:, group], grad_y[..., group], grad_end),
                    *(grad_x[..., group], grad_state[:, group]),
                )
                outputs, gradients = [maps.map], [grad_map]
                if grad_end_map is not None:
                    outputs, gradients = [*outputs, maps.end_map], [*gradients, grad_end_map]
                grads = torch.autograd.grad(outputs, leaves, gradients)
                for whole, part in zip(grad_params, grads, strict=True):
                    whole[group] = part
        return grad_x, *grad_params, grad_state, None


class _Maps(NamedTuple):
    """The block maps of a group of c channels, for a length that leaves `tail` steps over."""

    map: Tensor
    """[c, T+2N, T+2N], with its graph."""
    end_map: Tensor
    """[c, 2N, T+2N]: the state after the last step, from a block of which `tail` steps are real."""
    q_block: Tensor
    """complex128 [c, N]: q^T. In double, since a rounded one would compound over the blocks."""
    block: int

    @classmethod
    def of(cls, x: Tensor, params: list[Tensor]) -> _Maps:
        alpha, delta, theta, gamma, omega = params
        batch, length, _ = x.shape
        block = BLOCK if batch * length > FEW_STEPS else BLOCK // 2
        # Even, so that the pairs after the block's values can be viewed as complex numbers.
        block = min(block, length + length % 2)
        tail = length % block
        p, log_magnitude, turns = coefficients(alpha, delta, theta)
        whole = block_map(p, log_magnitude, turns, gamma, omega, block)
        # The state after the last step: from a whole block, or from one of only `tail` steps.
        end_map = whole[:, block:]
        if tail:
            write = end_map[..., block - tail : block]
            gap = write.new_zeros(*write.shape[:2], block - tail)
            steps = torch.tensor([tail], device=x.device)
            rotation = _rotation(powers(log_magnitude, turns, steps, whole.dtype)[:, 0])
            end_map = torch.cat([write, gap, rotation], dim=-1)
        with torch.no_grad():
            steps = torch.tensor([block], device=x.device)
            q_block = powers(log_magnitude, turns, steps, torch.float64)[:, 0]
        return cls(whole, end_map, q_block, block)


class _Cut:
    """How a group of c channels of x is cut into blocks of T steps, and those into segments.

    A segment lies as z [K, batch, c, T+2N]: a block's T values, then the 2N numbers of the state
    before it. Segments bound what is rearranged at a time, so that it stays in the cache.
    """

    def __init__(self, x: Tensor, maps: _Maps) -> None:
        self.maps = maps
        self.batch, self.length, _ = x.shape
        self.channels, width, _ = maps.map.shape
        self.block = maps.block
        self.ndim = (width - self.block) // 2
        elements = SEGMENT_ELEMENTS if x.device.type == "cpu" else 1 << 26
        blocks = max(1, elements // max(1, self.batch * self.channels * self.block))
        stride = blocks * self.block
        self.segments = [
            slice(start, min(start + stride, self.length))
            for start in range(0, self.length, stride)
        ]

    def gather(self, x: Tensor, reuse: Tensor | None = None) -> Tensor:
        """x [batch, steps, c] into blocks; the place for the states is left unset."""
        t = self.block
        full, tail = divmod(x.shape[1], t)
        shape = (full + (tail > 0), self.batch, self.channels, t + 2 * self.ndim)
        z = reuse
        if z is None or z.shape != shape:
            z = torch.empty(shape, dtype=self.maps.map.dtype, device=x.device)
        z[:full, ..., :t] = x[:, : full * t].unflatten(1, (full, t)).permute(1, 0, 3, 2)
        if tail:
            z[full, ..., :tail] = x[:, full * t :].transpose(1, 2)
            z[full, ..., tail:t] = 0
        return z

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """One matrix per channel [c, K*batch, T] into out [batch, steps, c]."""
        y = y.unflatten(1, (-1, self.batch))
        full, tail = divmod(out.shape[1], self.block)
        blocks = out[:, : full * self.block].unflatten(1, (full, self.block))
        blocks.copy_(y[:, :full].permute(2, 1, 3, 0))
        if tail:
            out[:, full * self.block :] = y[:, full, :, :tail].permute(1, 2, 0)

    def rows(self, z: Tensor) -> Tensor:
        """[K, batch, c, m] as one matrix per channel, a view [c, K*batch, m]."""
        return z.flatten(0, 1).transpose(0, 1)

    def states(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The state before every block of a segment, and the one after all of them.

        z has the segment's values; h, complex128 [batch, c, N], is the state before the first
        block. Pairs [K, batch, c, 2N], and complex128.
        """
        t = self.block
        states = self._as_states(torch.bmm(self.rows(z[..., :t]), self.maps.map[:, t:, :t].mT))
        _scan(states, h, self.maps.q_block)
        before = z.new_empty(*z.shape[:3], 2 * self.ndim)
        before[0] = torch.view_as_real(h).flatten(2)
        before[1:] = torch.view_as_real(states[:-1]).flatten(3)
        return before, states[-1].clone()

    def _as_states(self, pairs: Tensor) -> Tensor:
        """[c, K*batch, 2N] as complex128 [K, batch, c, N]."""
        shape = (pairs.shape[1] // self.batch, self.batch, self.channels, self.ndim)
        states = torch.empty(shape, dtype=torch.complex128, device=pairs.device)
        torch.view_as_real(states).flatten(0, 1).flatten(2).copy_(pairs.transpose(0, 1))
        return states

    def backward(
        self,
        x: Tensor,
        state: Tensor,
        grad_y: Tensor,
        grad_end: Tensor | None,
        grad_x: Tensor,
        grad_state: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Fills grad_x and grad_state; returns the gradients of the map and of the end map.

        The gradient of [y; h_after] of every block stands in g: grad_y is given, and the rest
        comes from the later blocks by the scan with time reversed.
        """
        t, whole, end_map = self.block, self.maps.map, self.maps.end_map
        h, z, states = state.to(torch.complex128), None, []
        for steps in self.segments:
            z = self.gather(x[:, steps], z)
            before, h = self.states(z, h)
            states.append(before)

        grad_end_map = through_end = g = None
        if grad_end is not None:
            end = torch.view_as_real(grad_end.resolve_conj()).flatten(2).transpose(0, 1)
            last = torch.cat([z[-1, ..., :t], before[-1]], dim=-1)
            grad_end_map = torch.bmm(end.mT, last.transpose(0, 1))
            # [batch, c, T+2N]: what the last block's inputs and state get from the end state.
            through_end = torch.bmm(end, end_map).transpose(0, 1)

        grad_map = torch.zeros_like(whole)
        q_conj = self.maps.q_block.conj().resolve_conj()
        carry = torch.zeros_like(h)
        for steps in reversed(self.segments):
            z = self.gather(x[:, steps], z)
            z[..., t:] = states.pop()
            g = self.gather(grad_y[:, steps], g)
            grads = self._as_states(torch.bmm(self.rows(g[..., :t]), whole[:, :t, t:]))
            if through_end is not None:
                grads[-1] += _as_complex(through_end[..., t:])
            _scan(grads, carry, q_conj, reverse=True)
            g[-1, ..., t:] = torch.view_as_real(carry).flatten(2)
            g[:-1, ..., t:] = torch.view_as_real(grads[1:]).flatten(3)
            carry = grads[0]
            grad_inputs = torch.bmm(self.rows(g), whole[..., :t])
            if through_end is not None:
                grad_inputs[:, -self.batch :] += through_end[..., :t].transpose(0, 1)
                through_end = None
            self.scatter(grad_inputs, grad_x[:, steps])
            grad_map.baddbmm_(self.rows(g).mT, self.rows(z))
        grad_state.copy_(carry)
        return grad_map, grad_end_map


def _scan(states: Tensor, h: Tensor, q: Tensor, reverse: bool = False) -> None:
    """states[k] += q * states[k - 1] in place, in order, with h before the first."""
    if states.is_meta:
        # No values, and by far the most calls of all that a plan runs.
        return
    for state in reversed(states.unbind(0)) if reverse else states.unbind(0):
        torch.addcmul(state, h, q, out=state)
        h = state


def _as_complex(pairs: Tensor) -> Tensor:
    """[..., 2N] interleaved real and imaginary parts as complex [..., N], a view."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


@lru_cache
def _toeplitz_basis(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 0/1 matrix [T, T*T] that lays T taps out as a lower-triangular Toeplitz matrix."""
    # An inference tensor in the cache could not be used in a backward pass later.
    with torch.inference_mode(False):
        i = torch.arange(block, device=device)
        lag = i[:, None] - i[None, :]
        return (lag == i[:, None, None]).flatten(1).to(dtype)


def block_map(
    p: Tensor, log_magnitude: Tensor, turns: Tensor, gamma: Tensor, omega: Tensor, block: int
) -> Tensor:
    """[[K, R], [W, Q]] of every channel, [c, T+2N, T+2N] in gamma's type.

    p, log_magnitude, turns: float64 [c, N], what `coefficients` returns; differentiable, as are
    gamma and omega. block: T, an even number.
    """
    return _BlockMap.apply(p, log_magnitude, turns, gamma, omega, block)


class _BlockMap(torch.autograd.Function):
    """In terms of P_t = q^t and r = gamma / sqrt(N), complex numbers standing for pairs:

        K's first column at t = sum_n Re(r p P_t), plus omega at 0      t = 0..T-1
        R_t = conj(r P_{t+1}), since Re(c h) = Re(c) Re(h) - Im(c) Im(h)
        W_t = p P_{T-1-t}
        Q = P_T

    The gradient dz of a complex z is dL/dRe z + i dL/dIm z, so that z = ab has da = dz conj(b).
    """

    @staticmethod
    def forward(ctx, p, log_magnitude, turns, gamma, omega, block):  # noqa: ANN001, ANN205
        channels, ndim = p.shape
        real = gamma.dtype
        q_powers = _first_powers(log_magnitude, turns, block, real)
        readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(ndim)
        p = p.to(real)
        ctx.save_for_backward(p, q_powers, readout)

        width = block + 2 * ndim
        whole = torch.empty(channels, width, width, dtype=real, device=p.device)
        reads = readout[:, None] * q_powers
        whole_complex = _as_complex(whole[..., block:])
        whole_complex[:, :block] = reads[:, 1:].conj()
        pairs = torch.view_as_real(reads).flatten(2)
        p_pairs = torch.stack([p, torch.zeros_like(p)], dim=-1).flatten(1)
        taps = torch.bmm(pairs[:, :block], p_pairs[..., None])[..., 0]
        taps[:, :1] += omega
        basis = _toeplitz_basis(block, real, p.device)
        whole[:, :block, :block] = (taps @ basis).unflatten(1, (block, block))
        writes = torch.view_as_real((p[:, None] * q_powers).index_select(1, _backwards(block, p)))
        whole[:, block:, :block].unflatten(1, (ndim, 2)).copy_(writes.permute(0, 2, 3, 1))
        whole[:, block:, block:] = _rotation(q_powers[:, block])
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        p, q_powers, readout = ctx.saved_tensors
        block, ndim = q_powers.shape[1] - 1, q_powers.shape[2]
        steps = torch.arange(block, dtype=p.dtype, device=p.device)
        basis = _toeplitz_basis(block, p.dtype, p.device)
        grad_taps = grad[:, :block, :block].flatten(1) @ basis.mT
        grad_reads = _as_complex(grad[:, :block, block:])
        grad_writes = grad[:, block:, :block].unflatten(1, (ndim, 2)).permute(0, 3, 1, 2)
        grad_writes = torch.view_as_complex(grad_writes.contiguous())
        grad_writes = grad_writes.index_select(1, _backwards(block, p))
        (a, b), (c, d) = (z.unbind(0) for z in _rotation_entries(grad[:, block:, block:]))
        grad_q_block = torch.complex(a + d, c - b)

        # Sums over t of what multiplies P, each with weight 1 and with weight t (t + 1 for R).
        through_reads = (grad_reads * q_powers[:, 1:]).conj()
        through_writes = grad_writes * q_powers[:, :block].conj()
        taps, taps_by_t = _weighted_sums(
            q_powers[:, :block], torch.stack([grad_taps, grad_taps * steps], dim=1)
        )
        taps, taps_by_t = taps.conj(), taps_by_t.conj()
        weights = torch.stack([torch.ones_like(steps), steps + 1]).expand(len(p), -1, -1)
        reads, reads_by_t = _weighted_sums(through_reads.resolve_conj(), weights)
        weights = torch.stack([torch.ones_like(steps), steps]).expand(len(p), -1, -1)
        writes, writes_by_t = _weighted_sums(through_writes, weights)

        grad_readout = p * taps + reads
        grad_p = (readout * taps.conj()).real + writes.real
        # dP_t conj(P_t) t, summed: P_t = exp(t log|q| + 2 pi i t turns).
        by_log = readout.conj() * (p * taps_by_t + reads_by_t) + p * writes_by_t
        by_log = by_log + block * grad_q_block * q_powers[:, block].conj()
        grad_gamma = torch.view_as_real(grad_readout.resolve_conj()) / math.sqrt(ndim)
        return (
            *(grad_p.double(), by_log.real.double(), 2 * math.pi * by_log.imag.double()),
            *(grad_gamma, grad_taps[:, :1], None),
        )


def _backwards(steps: int, like: Tensor) -> Tensor:
    """steps - 1, ..., 0. Selecting by these is faster than Tensor.flip."""
    return torch.arange(steps - 1, -1, -1, device=like.device)


def _first_powers(log_magnitude: Tensor, turns: Tensor, last: int, dtype: torch.dtype) -> Tensor:
    """q^0..q^last of [c, N] as complex [c, last + 1, N]: every eighth times the first eight."""
    step = 8
    coarse = torch.arange(0, last + 1, step, device=turns.device)
    fine = torch.arange(step, device=turns.device)
    coarse, fine = (powers(log_magnitude, turns, t, dtype) for t in (coarse, fine))
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, : last + 1]


def _weighted_sums(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums over t of complex z [c, T, N] with real weights [c, 2, T]: complex [c, N] each."""
    sums = torch.bmm(weights, torch.view_as_real(z).flatten(2))
    return _as_complex(sums).unbind(1)


def _rotation_entries(matrix: Tensor) -> Tensor:
    """Of [c, 2N, 2N] on interleaved pairs, the 2 x 2 blocks on the diagonal: [2, 2, c, N]."""
    ndim = matrix.shape[1] // 2
    blocks = matrix.unflatten(2, (ndim, 2)).unflatten(1, (ndim, 2))
    return blocks.diagonal(dim1=1, dim2=3).permute(1, 2, 0, 3)


def _rotation(q: Tensor) -> Tensor:
    """Multiplication by q [c, N] as a real matrix on interleaved pairs: [c, 2N, 2N]."""
    real, imag = q.real, q.imag
    two_by_two = torch.stack([torch.stack([real, -imag]), torch.stack([imag, real])])
    # [2, 2, c, N] -> [c, 2, 2, N] -> the N on a diagonal: [c, N, 2, N, 2]
    matrix = torch.diag_embed(two_by_two.permute(2, 0, 1, 3), dim1=1, dim2=3)
    return matrix.flatten(3, 4).flatten(1, 2)


def _channel_groups(channels: int) -> list[slice]:
    """Slices of at most GROUP_CHANNELS channels, whose maps exist at the same time."""
    starts = range(0, channels, GROUP_CHANNELS)
    return [slice(start, min(start + GROUP_CHANNELS, channels)) for start in starts]
