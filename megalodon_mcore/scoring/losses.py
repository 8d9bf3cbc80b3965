"""Losses of tokens that a model reads side by side, or one text after another in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megalodon_mcore.hf import MegalodonCache

ROWS = 1024
"""Logits that are widened to float32 at once."""


def batch_losses(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Losses of each row's tokens but its first, given those before.

    Args:
        model: any causal model.
        rows: int64 [n + 1] each, n >= 1.

    Returns:
        float64 [n] each, nats.
    """
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row) - 1] = 1
    tokens, mask = tokens.to(model.device), mask[:, :-1].to(model.device)
    # Padding comes last, where causality keeps it out of every loss.
    given = None if bool(mask.all()) else mask
    with torch.no_grad():
        logits = model(tokens[:, :-1], attention_mask=given, use_cache=False).logits
    return [
        nats(own[: len(row) - 1], tokens[index, 1 : len(row)])
        for index, (own, row) in enumerate(zip(logits, rows, strict=True))
    ]


def piece_losses(model: PreTrainedModel, cache: MegalodonCache, tokens: np.ndarray) -> np.ndarray:
    """Losses of a piece's tokens but its first, which is the last of the piece before.

    Args:
        model: a Megalodon.
        cache: what it remembers of all before; goes on by n steps.
        tokens: int64 [n + 1].

    Returns:
        float64 [n], nats.
    """
    given = torch.from_numpy(tokens)[None].to(model.device)
    with torch.no_grad():
        logits = model(given[:, :-1], past_key_values=cache).logits
    return nats(logits[0], given[0, 1:])


def nats(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Cross entropy in float32.

    Args:
        logits: [n, vocab_size].
        targets: int64 [n].

    Returns:
        float64 [n].
    """
    parts = [
        F.cross_entropy(own.float(), target, reduction="none")
        for own, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(parts).double().cpu().numpy()
