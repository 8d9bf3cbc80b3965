"""Float64 reference of the complex exponential moving average (CEMA), one step at a time."""

import math

import torch
from torch import Tensor


def cema_naive(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute CEMA by its recurrence (arXiv 2404.08801, section 3.1) in float64.

    Shapes are those of :func:`megalodon_mcore.kernels.cema.cema`; any float dtype is taken and
    cast. Returns y, float64 [batch, length, D], and the state after the last step, complex128
    [batch, D, N]. Autograd through the loop gives the reference gradients.
    """
    x, alpha, delta, theta, gamma, omega = (
        a.to(torch.float64) for a in (x, alpha, delta, theta, gamma, omega)
    )
    batch, length, channels = x.shape
    ndim = alpha.shape[1]

    p = torch.sigmoid(alpha)[:, :, 0]
    magnitude = 1 - torch.sigmoid(alpha)[:, :, 0] * torch.sigmoid(delta)[:, :, 0]
    phi = torch.sigmoid(theta)[:, :, 0] * (2 * math.pi / ndim)
    n = torch.arange(1, ndim + 1, dtype=torch.float64, device=x.device)
    q = magnitude * torch.exp(1j * n * phi)
    gamma_complex = gamma[:, :, 0] + 1j * gamma[:, :, 1]

    if state is None:
        h = torch.zeros(batch, channels, ndim, dtype=torch.complex128, device=x.device)
    else:
        h = state.to(torch.complex128)
    outputs = []
    for t in range(length):
        h = q * h + p * x[:, t, :, None]
        y = (gamma_complex * h).sum(dim=-1).real / math.sqrt(ndim) + omega[:, 0] * x[:, t]
        outputs.append(y)
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), h
