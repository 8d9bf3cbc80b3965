"""A block of CEMA's steps as one linear map per channel.

With h for the state as 2N real numbers per channel (real and imaginary parts interleaved), a block
of T steps is

    [ y_block ]   [ K  R ] [ x_block ]
    [ h_after ] = [ W  Q ] [ h_before ]

with K[i, j] = Re(sum_n gamma_n p_n q_n^(i-j)) / sqrt(N) for j <= i (plus omega on the diagonal),
R the response of the outputs to the incoming state, W what the inputs leave in the state, and Q
the multiplication by q^T. That is done in double by who scans, so that zeros stand for Q here; its
gradient counts.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coefficients import powers


def as_complex(pairs: Tensor) -> Tensor:
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
        q_powers = first_powers(log_magnitude, turns, block, real)
        readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(ndim)
        p = p.to(real)
        ctx.save_for_backward(p, q_powers, readout)

        width = block + 2 * ndim
        whole = torch.empty(channels, width, width, dtype=real, device=p.device)
        reads = readout[:, None] * q_powers
        whole_complex = as_complex(whole[..., block:])
        whole_complex[:, :block] = reads[:, 1:].conj()
        pairs = torch.view_as_real(reads).flatten(2)
        p_pairs = torch.stack([p, torch.zeros_like(p)], dim=-1).flatten(1)
        taps = torch.bmm(pairs[:, :block], p_pairs[..., None])[..., 0]
        taps[:, :1] += omega
        basis = _toeplitz_basis(block, real, p.device)
        whole[:, :block, :block] = (taps @ basis).unflatten(1, (block, block))
        writes = torch.view_as_real((p[:, None] * q_powers).index_select(1, _backwards(block, p)))
        whole[:, block:, :block].unflatten(1, (ndim, 2)).copy_(writes.permute(0, 2, 3, 1))
        whole[:, block:, block:] = 0
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        p, q_powers, readout = ctx.saved_tensors
        block, ndim = q_powers.shape[1] - 1, q_powers.shape[2]
        steps = torch.arange(block, dtype=p.dtype, device=p.device)
        basis = _toeplitz_basis(block, p.dtype, p.device)
        grad_taps = grad[:, :block, :block].flatten(1) @ basis.mT
        grad_reads = as_complex(grad[:, :block, block:])
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
            grad_p.double(),
            by_log.real.double(),
            2 * math.pi * by_log.imag.double(),
            grad_gamma,
            grad_taps[:, :1],
            None,
        )


def _backwards(steps: int, like: Tensor) -> Tensor:
    """steps - 1, ..., 0. Selecting by these is faster than Tensor.flip."""
    return torch.arange(steps - 1, -1, -1, device=like.device)


def first_powers(log_magnitude: Tensor, turns: Tensor, last: int, dtype: torch.dtype) -> Tensor:
    """q^0..q^last of [c, N] as complex [c, last + 1, N]: every eighth times the first eight."""
    step = 8
    coarse = torch.arange(0, last + 1, step, device=turns.device)
    fine = torch.arange(step, device=turns.device)
    coarse, fine = (powers(log_magnitude, turns, t, dtype) for t in (coarse, fine))
    result = (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, : last + 1]
    # Of no weight in a sum, and denormal numbers take a processor a hundred times as long.
    return result.masked_fill_(result.abs() < 1e-30, 0)


def _weighted_sums(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums over t of complex z [c, T, N] with real weights [c, 2, T]: complex [c, N] each."""
    sums = torch.bmm(weights, torch.view_as_real(z).flatten(2))
    first, second = as_complex(sums).unbind(1)
    return first, second


def _rotation_entries(matrix: Tensor) -> Tensor:
    """Of [c, 2N, 2N] on interleaved pairs, the 2 x 2 blocks on the diagonal: [2, 2, c, N]."""
    ndim = matrix.shape[1] // 2
    blocks = matrix.unflatten(2, (ndim, 2)).unflatten(1, (ndim, 2))
    return blocks.diagonal(dim1=1, dim2=3).permute(1, 2, 0, 3)
