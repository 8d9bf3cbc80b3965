"""The query and key of one position, in as few calls as it takes: for decoding."""

import torch
from torch import Tensor

from ..row_norm.step import unit_rows


def query_key_step(
    z: Tensor, scale: Tensor, bias: Tensor, eps: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor]:
    """What `query_key` makes of a single position, for any device; nothing is checked.

    Args:
        z: [batch, heads, width] of any floating type.
        scale: [2, 1, heads, width], weight + 1, float32 as bias is (float64 with float64 z).
        bias: [2, 1, heads, width].
        eps: sqrt(width eps), a single number of scale's type.
        turn: the position's row of `turns`, complex [width / 2].

    Returns:
        q and k in z's shape and type. Not differentiable.
    """
    # Both the norm and the scale are without a factor of sqrt(width).
    both = torch.addcmul(bias, unit_rows(z.to(scale.dtype), eps), scale)
    torch.view_as_complex(both.view(*both.shape[:-1], -1, 2)).mul_(turn)
    q, k = both.to(z.dtype).unbind(0)
    return q, k
