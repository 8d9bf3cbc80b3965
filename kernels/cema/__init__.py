"""Complex exponential moving average (CEMA), the recurrence of a Megalodon layer."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from .coefficients import coefficients, powers
from .portable import cema_portable, cema_response_portable

__all__ = ["cema", "cema_response", "coefficients", "powers"]


def cema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Filter every channel of x with its own complex exponential moving average.

    Per channel d and n = 1..N (arXiv 2404.08801, section 3.1):

        p = sigmoid(alpha)
        q = (1 - sigmoid(alpha) sigmoid(delta)) exp(2 pi i n sigmoid(theta) / N)
        h_t = q h_{t-1} + p x_t
        y_t = Re(sum_n gamma_n h_{t,n}) / sqrt(N) + omega x_t

    Args:
        x: [batch, length, D], any float dtype, any strides, any length (0 included).
        alpha: float32 [D, N, 1].
        delta: float32 [D, N, 1].
        theta: float32 [D, 1, 1].
        gamma: float32 [D, N, 2], real and imaginary part.
        omega: float32 [D, 1].
        state: complex64 [batch, D, N], h before the first step; None stands for zeros.
        return_state: whether to return h after the last step.

    Returns:
        y, with x's shape and dtype, and h after the last step (complex64 [batch, D, N]), or None
        where return_state is false. Both are differentiable (once) in x, state and the five
        parameters. The arithmetic is float32; for float64 x, with float64 parameters and a
        complex128 state, it is float64. Autocast is off inside; torch's setting of float32
        matmul precision (TF32) applies. A NaN or infinity in x may also reach outputs up to 31
        steps before it.

    Raises:
        ValueError: an argument's shape or dtype is not as above.
    """
    _check(x, alpha, delta, theta, gamma, omega, state)
    if use_triton(x):
        from .triton import cema_triton

        return cema_triton(x, alpha, delta, theta, gamma, omega, state, return_state)
    return cema_portable(x, alpha, delta, theta, gamma, omega, state, return_state)


def cema_response(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """A state's share of the outputs: those of `cema` for `length` zeros after it.

    CEMA is linear, so the outputs of x after a state are those of x after zeros plus this:

        y_t = Re(sum_n gamma_n q_n^(t+1) state_n) / sqrt(N),  t = 0..length-1

    Args:
        state: complex64 [batch, D, N], or complex128 with float64 parameters.
        alpha: As delta, theta and gamma, what `cema` takes.
        delta: See alpha.
        theta: See alpha.
        gamma: See alpha.
        length: Steps, at least 1.

    Returns:
        y, float32 (float64) [batch, length, D]; differentiable in state and the parameters.

    Raises:
        ValueError: the state's shape does not fit, or length is below 1.
    """
    if state.dim() != 3 or state.shape[1:] != alpha.shape[:2] or not state.is_complex():
        raise ValueError(
            f"state is {state.dtype} {list(state.shape)}; for alpha {list(alpha.shape)} it must "
            f"be complex [batch, {alpha.shape[0]}, {alpha.shape[1]}]."
        )
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1.")
    return cema_response_portable(state, alpha, delta, theta, gamma, length)


def _check(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None,
) -> None:
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; it must be a float tensor [batch, length, D]."
        )
    if alpha.dim() != 3 or alpha.shape[1] < 1:
        raise ValueError(f"alpha is {list(alpha.shape)}; it must be [D, N, 1] with N >= 1.")
    batch, _, channels = x.shape
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
        expected["state"] = (state, (batch, channels, ndim), real.to_complex())
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; for x {x.dtype} {list(x.shape)} "
                f"and N = {ndim} it must be {dtype} {list(shape)}."
            )
