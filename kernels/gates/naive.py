"""The gates as written, in float64: the oracles of the fast paths."""

from torch import Tensor


def gated_silu_naive(gate: Tensor, x: Tensor) -> Tensor:
    """Same arguments as `gated_silu`; the result is float64."""
    gate, x = gate.double(), x.double()
    return gate / (1 + (-gate).exp()) * x


def swiglu_naive(hidden: Tensor) -> Tensor:
    """Same argument as `swiglu`; the result is float64."""
    half = hidden.shape[-1] // 2
    return gated_silu_naive(hidden[..., :half], hidden[..., half:])
