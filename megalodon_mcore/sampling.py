"""Picks the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Temperature, then top-k, then top-p; temperature 0 takes the likeliest token.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}; it takes 0 or more.")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; it takes 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p is {self.top_p}; it takes a number above 0 up to 1.")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """float32 logits [batch, vocabulary] to int64 tokens [batch]."""
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        # The likeliest at 0: next to no temperature overflows.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(
            self.temperature, torch.finfo(logits.dtype).tiny
        )
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        if self.top_p < 1.0:
            logits = self._keep_nucleus(logits)
        probabilities = torch.softmax(logits, dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def _keep_nucleus(self, logits: Tensor) -> Tensor:
        """Keeps the fewest likeliest tokens whose probabilities reach top_p."""
        descending, order = logits.sort(dim=-1, descending=True)
        probabilities = torch.softmax(descending, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = descending.masked_fill(before >= self.top_p, float("-inf"))
        return torch.empty_like(logits).scatter_(-1, order, kept)
