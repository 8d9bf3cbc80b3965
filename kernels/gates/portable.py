"""Gates as plain torch functions, for any device."""

from torch import Tensor
from torch.nn import functional as F

from ..plain import plain
from ..types import compute_dtype


@plain
def gated_silu_portable(gate: Tensor, x: Tensor) -> Tensor:
    """Same arguments and result as `gated_silu`; nothing is checked here."""
    dtype = compute_dtype(gate)
    return (F.silu(gate.to(dtype)) * x.to(dtype)).to(x.dtype).contiguous()


@plain
def swiglu_portable(hidden: Tensor) -> Tensor:
    """Same argument and result as `swiglu`; nothing is checked here."""
    gate, x = hidden.to(compute_dtype(hidden)).chunk(2, dim=-1)
    return (F.silu(gate) * x).to(hidden.dtype).contiguous()
