"""Float64 reference of the complex exponential moving average (CEMA), one step at a time."""

import math

import torch
from torch import Tensor

from ..segments import Segments


def cema_naive(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute CEMA by its recurrence (arXiv 2404.08801, section 3.1) in float64.

    Shapes are those of :func:`megalodon_mcore.kernels.cema.cema`; any float dtype is taken and
    cast. Returns y, float64 [length, batch, D], and the states after the segments, complex128
    [S, D, N]. Autograd through the loop gives the reference gradients.
    """
    x, alpha, delta, theta, gamma, omega = (
        a.to(torch.float64) for a in (x, alpha, delta, theta, gamma, omega)
    )
    length, batch, channels = x.shape
    segments = segments or Segments.of_rows(length, batch)
    ndim = alpha.shape[1]

    p = torch.sigmoid(alpha)[:, :, 0]
    magnitude = 1 - torch.sigmoid(alpha)[:, :, 0] * torch.sigmoid(delta)[:, :, 0]
    phi = torch.sigmoid(theta)[:, :, 0] * (2 * math.pi / ndim)
    n = torch.arange(1, ndim + 1, dtype=torch.float64, device=x.device)
    q = magnitude * torch.exp(1j * n * phi)
    gamma_complex = gamma[:, :, 0] + 1j * gamma[:, :, 1]

    y, states = torch.empty_like(x), []
    for number, segment in enumerate(segments):
        h = torch.zeros(channels, ndim, dtype=torch.complex128, device=x.device)
        if segment.position:
            h = state[number].to(torch.complex128)
        outputs = []
        for x_t in x[segment.steps, segment.row]:
            h = q * h + p * x_t[:, None]
            y_t = (gamma_complex * h).sum(dim=-1).real / math.sqrt(ndim) + omega[:, 0] * x_t
            outputs.append(y_t)
        y[segment.steps, segment.row] = torch.stack(outputs)
        states.append(h)
    return y, torch.stack(states)
