"""Queries and keys from the shared representation z."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.query_key import query_key
from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter


class QueryKey(Float32Module):
    """Normalizes each head of z, scales and shifts it into a query and a key, and rotates both."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float,
        rotary_base: float,
        chunk_size: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.rotary_base = rotary_base
        self.chunk_size = chunk_size
        self.weight = float32_parameter((2, num_heads * head_dim), device)
        self.bias = float32_parameter((2, num_heads * head_dim), device)

    def forward(self, z: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """[length, batch, heads * width] to two [length, batch, heads, width] in z's dtype."""
        return query_key(
            z.unflatten(-1, (self.num_heads, self.head_dim)),
            self.weight,
            self.bias,
            self.eps,
            self.rotary_base,
            self.chunk_size,
            segments,
        )
