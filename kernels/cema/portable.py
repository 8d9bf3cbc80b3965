"""CEMA in plain torch, for any device: a scan over blocks of steps, or few steps one by one."""

import math

import torch
from torch import Tensor

from ..segments import Segments
from .coefficients import coefficients
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
    segments: Segments,
    state: Tensor | None,
) -> Tensor:
    """y of :func:`megalodon_mcore.kernels.cema.cema`, from the same arguments, unchecked."""
    if not x.numel() or (segments.whole_rows and x.shape[0] <= SHORT):
        return _recurrence(x, alpha, delta, theta, gamma, omega, segments, state)
    return BlockScan.apply(x, alpha, delta, theta, gamma, omega, segments, state)


def _recurrence(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> Tensor:
    """The equations step by step, under ordinary autograd; each row is a segment."""
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    p = p.to(gamma.dtype)
    # q and the products with it in double: a rounded q would compound over the steps of a stream.
    q = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)
    readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(alpha.shape[1])
    h = readout.new_zeros(len(segments), *readout.shape)
    if state is not None and segments.continued:
        h = state
    outputs = []
    for x_t in x.to(p.dtype).unbind(0):
        h = (q * h).to(readout.dtype) + p * x_t[..., None]
        outputs.append((readout * h).real.sum(-1) + omega[:, 0] * x_t)
    y = torch.stack(outputs) if outputs else x.clone()
    return y.to(x.dtype)
