"""Complex exponential moving average (CEMA), the recurrence of a Megalodon layer."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..segments import Segments, checked_segments
from ..types import compute_dtype
from .coefficients import coefficients, powers
from .portable import cema_portable

__all__ = ["cema", "cema_summary", "coefficients", "powers"]


def cema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Filter every channel of x's documents with its own complex exponential moving average.

    Per channel d and n = 1..N (arXiv 2404.08801, section 3.1):

        p = sigmoid(alpha)
        q = (1 - sigmoid(alpha) sigmoid(delta)) exp(2 pi i n sigmoid(theta) / N)
        h_t = q h_{t-1} + p x_t
        y_t = Re(sum_n gamma_n h_{t,n}) / sqrt(N) + omega x_t

    Args:
        x: [length, batch, D], any float dtype, any strides.
        alpha: float32 [D, N, 1].
        delta: float32 [D, N, 1].
        theta: float32 [D, 1, 1].
        gamma: float32 [D, N, 2], real and imaginary part.
        omega: float32 [D, 1].
        segments: which documents x's steps belong to; None: each row is the start of one.
        state: complex64 [S, D, N], h before each segment; not read where one starts a document.
        return_state: whether to return h after each segment.

    Returns:
        y, with x's shape and dtype, and h after each segment (complex64 [S, D, N]), or None where
        return_state is false. Both are differentiable (once) in x, state and the five parameters.
        The arithmetic is float32; for float64 x, with float64 parameters and a complex128 state,
        it is float64. Autocast is off inside; torch's setting of float32 matmul precision (TF32)
        applies. A NaN or infinity in x may also reach outputs of its document up to 31 steps
        before it.

    Raises:
        ValueError: an argument's shape or dtype is not as above, or a state is missing.
    """
    segments = checked_segments(x, segments)
    _check(x, alpha, delta, theta, gamma, omega, segments, state)
    if x.numel() and use_triton(x):
        from .triton import cema_triton as run
    else:
        run = cema_portable
    with torch.autocast(x.device.type, enabled=False):
        y = run(x, alpha, delta, theta, gamma, omega, segments, state)
        if not return_state:
            return y, None
        after = cema_summary(x, alpha, delta, theta, segments)
        if state is None or not segments.continued:
            return y, after
        # What the segment adds to zero, and what is left of the state before it.
        _, log_magnitude, turns = coefficients(alpha, delta, theta)
        lengths = segments.tensor("length", x.device)
        left = powers(log_magnitude, turns, lengths, after.dtype.to_real()).transpose(0, 1)
        continued = segments.tensor("position", x.device)[:, None, None] > 0
        return y, after + left * torch.where(continued, state, 0)


def cema_summary(
    x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, segments: Segments | None = None
) -> Tensor:
    """The state h that each segment would leave behind if it started a document.

    Args:
        x: As alpha, delta and theta, what `cema` takes.
        alpha: See x.
        delta: See x.
        theta: See x.
        segments: which steps, not necessarily all of x; None: each row's.

    Returns:
        complex64 (complex128 for float64 x) [S, D, N]; differentiable (once) in x and parameters.

    Raises:
        ValueError: an argument's shape or dtype does not fit.
    """
    segments = checked_segments(x, segments)
    if alpha.dim() != 3 or x.shape[-1] != alpha.shape[0]:
        raise ValueError(f"alpha is {list(alpha.shape)}; for x {list(x.shape)} it is [D, N, 1].")
    if not len(segments):
        return x.new_zeros(0, *alpha.shape[:2], dtype=compute_dtype(x).to_complex())
    if x.numel() and use_triton(x):
        from .triton import Summary
    else:
        from .scan import Summary
    with torch.autocast(x.device.type, enabled=False):
        p, log_magnitude, turns = coefficients(alpha, delta, theta)
        return p.to(compute_dtype(x)) * Summary.apply(x, log_magnitude, turns, segments)


def _check(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    segments: Segments,
    state: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [length, batch, D].")
    if alpha.dim() != 3 or alpha.shape[1] < 1:
        raise ValueError(f"alpha is {list(alpha.shape)}; it must be [D, N, 1] with N >= 1.")
    channels = x.shape[2]
    ndim = alpha.shape[1]
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = {
        "alpha": (alpha, (channels, ndim, 1), real),
        "delta": (delta, (channels, ndim, 1), real),
        "theta": (theta, (channels, 1, 1), real),
        "gamma": (gamma, (channels, ndim, 2), real),
        "omega": (omega, (channels, 1), real),
    }
    if state is not None:
        expected["state"] = (state, (len(segments), channels, ndim), real.to_complex())
    elif segments.continued:
        raise ValueError("a segment goes on with its document; it needs the state before it.")
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; for x {x.dtype} {list(x.shape)} "
                f"and N = {ndim} it must be {dtype} {list(shape)}."
            )
