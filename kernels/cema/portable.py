"""CEMA in plain torch, for any device: a scan over blocks of steps, or few steps one by one."""

import math

import torch
from torch import Tensor

from ..segments import Segments
from ..types import compute_dtype
from .coefficients import coefficients, powers
from .scan import BlockScan, Summary

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
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema`: same arguments, unchecked."""
    with torch.autocast(x.device.type, enabled=False):
        if not x.numel() or (segments.whole_rows and x.shape[0] <= SHORT):
            y, after = _recurrence(x, alpha, delta, theta, gamma, omega, segments, state)
            return y, after if return_state else None
        y = BlockScan.apply(x, alpha, delta, theta, gamma, omega, segments, state)
        if not return_state:
            return y, None
        after = cema_summary_portable(x, alpha, delta, theta, segments)
        return y, after_segments(after, alpha, delta, theta, segments, state)


def cema_summary_portable(
    x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, segments: Segments
) -> Tensor:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema_summary`, unchecked."""
    with torch.autocast(x.device.type, enabled=False):
        p, log_magnitude, turns = coefficients(alpha, delta, theta)
        return p.to(compute_dtype(x)) * Summary.apply(x, log_magnitude, turns, segments)


def after_segments(
    summary: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> Tensor:
    """h after segments [S, D, N]: what they add to zero, and what is left of h before them."""
    if state is None or not segments.continued:
        return summary
    _, log_magnitude, turns = coefficients(alpha, delta, theta)
    real = summary.dtype.to_real()
    left = powers(log_magnitude, turns, segments.tensor("length", summary.device), real)
    continued = segments.tensor("position", summary.device)[:, None, None] > 0
    return summary + left.transpose(0, 1) * torch.where(continued, state, 0)


def _recurrence(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
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
    return y.to(x.dtype), h
