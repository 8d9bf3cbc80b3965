"""CEMA in plain torch, for any device: a scan over blocks of steps, or few steps one by one."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..types import compute_dtype
from . import maps
from .coefficients import coefficients, powers
from .scan import BlockScan

# Up to this length the plain recurrence costs less than building a block's map.
SHORT = 16


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
        state = torch.zeros(shape, dtype=compute_dtype(x).to_complex(), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        if length <= SHORT:
            y, state_out = _recurrence(x, alpha, delta, theta, gamma, omega, state)
        else:
            y, state_out = BlockScan.apply(
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
            _response,
            state,
            alpha,
            delta,
            theta,
            gamma,
            length,
            use_reentrant=False,
            preserve_rng_state=False,
        )


def _response(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """y_t = Re(readout q^(t+1) h), q^(t+1) split into q^(block start) and q^(step + 1)."""
    batch, channels, ndim = state.shape
    real = state.dtype.to_real()
    block = min(maps.BLOCK, length)
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
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    p = p.to(gamma.dtype)
    # q and the products with it in double: a rounded q would compound over the steps of a stream.
    q = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)
    readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(alpha.shape[1])
    outputs = []
    for x_t in x.to(p.dtype).unbind(1):
        state = (q * state).to(readout.dtype) + p * x_t[..., None]
        outputs.append((readout * state).real.sum(-1) + omega[:, 0] * x_t)
    return torch.stack(outputs, dim=1).to(x.dtype), state
