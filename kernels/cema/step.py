"""CEMA of one step, in as few calls as it takes: what decoding spends its time on.

What a state decays to and adds to the output does not depend on the step's input. So a model's
layers do that together, before the first of them has its input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .portable import recurrence_weights


class StepWeights(NamedTuple):
    """What a step takes from the parameters; [..., 2N] are complex numbers as pairs of reals.

    q is complex128 [D, N]. [D, 2N] are drive, p beside zeros, and readout, the conjugate of
    gamma / sqrt(N). direct, [D], is what an input adds to its own output.
    """

    q: Tensor
    drive: Tensor
    readout: Tensor
    direct: Tensor


def step_weights(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> StepWeights:
    """Computes them from `cema`'s parameters of these names."""
    p, q, readout = recurrence_weights(alpha, delta, theta, gamma)
    drive = torch.stack([p, torch.zeros_like(p)], dim=-1).flatten(1)
    readout = _pairs(readout.conj().resolve_conj())
    return StepWeights(q, drive, readout, (drive * readout).sum(-1) + omega[:, 0])


def cema_decayed(weights: StepWeights, state: Tensor) -> tuple[Tensor, Tensor]:
    """A state's share of the next one and of the next output; dimensions before may be more.

    Args:
        weights: As `step_weights` makes them.
        state: complex64 [batch, D, N] (complex128 with float64 weights).

    Returns:
        q state, like state, and float32 (float64) [batch, D]. Not differentiable.
    """
    # The product in double: a rounded q would compound over the tokens.
    decayed = (weights.q * state).to(state.dtype)
    # Re(gamma h) is a plain product with the conjugate's pairs.
    return decayed, (_pairs(decayed) * weights.readout).sum(-1)


def drive_(decayed: Tensor, weights: StepWeights, x: Tensor) -> Tensor:
    """Adds an input's share, of float32 (float64) x [batch, D], to a decayed state in place."""
    _pairs(decayed).addcmul_(weights.drive, x.unsqueeze(-1))
    return decayed


def cema_step(x: Tensor, weights: StepWeights, state: Tensor) -> tuple[Tensor, Tensor]:
    """What `cema` makes of a single step, for any device; nothing is checked.

    Args:
        x: [batch, D] of any floating type.
        weights: As `step_weights` makes them.
        state: h before the step, complex64 [batch, D, N] (complex128 with float64 weights).

    Returns:
        y like x, and h after the step. Not differentiable.
    """
    decayed, response = cema_decayed(weights, state)
    real_x = x.to(response.dtype)
    y = torch.addcmul(response, weights.direct, real_x)
    return y.to(x.dtype), drive_(decayed, weights, real_x)


def _pairs(z: Tensor) -> Tensor:
    """Complex [..., N] as real [..., 2N], in the same memory."""
    return torch.view_as_real(z).flatten(-2)
