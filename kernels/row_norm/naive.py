"""RMSNorm and LayerNorm as written, in float64: the oracles of the fast paths."""

from torch import Tensor


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same arguments as `rms_norm`; the result is float64."""
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1)


def layer_norm_naive(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Same arguments as `layer_norm`; the result is float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1) + bias
