"""RMSNorm and LayerNorm as plain torch functions, for any device."""

from torch import Tensor

from ..plain import plain
from ..types import compute_dtype


@plain
def rms_norm_portable(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `rms_norm`; nothing is checked here."""
    wide = x.to(compute_dtype(x))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * (weight.to(wide.dtype) + 1)).to(x.dtype).contiguous()


@plain
def layer_norm_portable(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `layer_norm`; nothing is checked here."""
    wide = x.to(compute_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd * (weight.to(wide.dtype) + 1) + bias.to(wide.dtype)
    return y.to(x.dtype).contiguous()
