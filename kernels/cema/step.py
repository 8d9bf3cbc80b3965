"""CEMA of one step, in as few calls as it takes: what decoding spends its time on."""

from typing import NamedTuple

import torch
from torch import Tensor

from .portable import recurrence_weights


class StepWeights(NamedTuple):
    """What a step takes from alpha, delta, theta and gamma; complex numbers as pairs of reals.

    q is complex128 [D, N]. [D, 2N] are drive, p beside zeros, and readout, the conjugate of
    gamma / sqrt(N).
    """

    q: Tensor
    drive: Tensor
    readout: Tensor


def step_weights(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> StepWeights:
    """Computes them from `cema`'s parameters of these names."""
    p, q, readout = recurrence_weights(alpha, delta, theta, gamma)
    drive = torch.stack([p, torch.zeros_like(p)], dim=-1)
    return StepWeights(q, drive.flatten(1), _pairs(readout.conj().resolve_conj()))


def cema_step(
    x: Tensor, weights: StepWeights, omega: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What `cema` makes of a single step, for any device; nothing is checked.

    Args:
        x: [batch, D] of any floating type.
        weights: As `step_weights` makes them.
        omega: [D], in drive's type.
        state: h before the step, complex64 [batch, D, N] (complex128 with float64 weights).

    Returns:
        y like x, and h after the step. Not differentiable.
    """
    q, drive, readout = weights
    # The product with q in double: a rounded q would compound over the tokens.
    state = (q * state).to(state.dtype)
    real_x = x.to(drive.dtype)
    # Re(gamma h) is a plain product with the conjugate's pairs.
    h = _pairs(state).addcmul_(drive, real_x.unsqueeze(-1))
    y = torch.addcmul((h * readout).sum(-1), omega, real_x)
    return y.to(x.dtype), state


def _pairs(z: Tensor) -> Tensor:
    """Complex [..., N] as real [..., 2N], in the same memory."""
    return torch.view_as_real(z).flatten(-2)
