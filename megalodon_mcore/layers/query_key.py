"""Queries and keys from the shared representation z."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter


class QueryKeyAffine(Float32Module):
    """Normalizes each head of z, then scales and shifts it into a query and a key.

    q = rms_norm(z) * (weight[0] + 1) / sqrt(head width) + bias[0], k with row 1; in float32.
    """

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.weight = float32_parameter((2, num_heads * head_dim), device)
        self.bias = float32_parameter((2, num_heads * head_dim), device)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[length, batch, heads * width] to two [length, batch, heads, width] in z's dtype."""
        heads = z.unflatten(-1, (self.num_heads, self.head_dim))
        normalized = F.rms_norm(heads.float(), (self.head_dim,), eps=self.eps)
        scale = (self.weight + 1.0) / math.sqrt(self.head_dim)
        scale = scale.view(2, self.num_heads, self.head_dim)
        shift = self.bias.view(2, self.num_heads, self.head_dim)
        query = torch.addcmul(shift[0], normalized, scale[0])
        key = torch.addcmul(shift[1], normalized, scale[1])
        return query.to(z.dtype), key.to(z.dtype)
