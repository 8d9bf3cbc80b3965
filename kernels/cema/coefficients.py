"""p and q of CEMA's recurrence, and powers of q."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
