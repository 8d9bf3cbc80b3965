"""Where samples start that a collator packed into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_megalodon import require

# Arguments by which transformers' collators and trainers mark samples packed into one row.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
PACKING = (*CUMULATIVE_LENGTHS, "seq_idx")


def packed_samples(
    position_ids: Tensor | None, real: Tensor | None, inputs: Tensor, others: dict
) -> list[list[int]] | None:
    """Where samples start in each row, and its length; None where a row is one sample.

    Raises:
        ValueError: what says so contradicts itself, or samples are packed beside padding.
    """
    batch, length = inputs.shape[:2]
    if position_ids is not None and (
        tuple(position_ids.shape) not in ((batch, length), (1, length))
        or position_ids.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {list(position_ids.shape)}; it takes "
            f"integers {[batch, length]}."
        )
    starts = [
        sample_starts(name, others[name], batch, length)
        for name in PACKING
        if others.get(name) is not None
    ]
    if position_ids is not None and not counts_a_row(position_ids, real, inputs):
        rises = position_ids.diff(dim=1) == 1
        first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
        fresh = torch.cat([first, ~rises], dim=1)
        require(
            (position_ids[:, 1:][~rises] == 0).all(),
            "position_ids jump in a row, but not to 0, where a packed sample would start.",
        )
        starts.append(fresh.expand(batch, -1).cpu())
    if not starts:
        return None
    if any(not torch.equal(other, starts[0]) for other in starts):
        raise ValueError(
            f"position_ids, {', '.join(PACKING)}: two of them disagree on where samples start."
        )
    if int(starts[0].sum()) == batch:
        return None
    if real is not None:
        raise ValueError(
            "attention_mask has zeros and the rows hold packed samples; leave padding out of them, "
            "or give every sample a row of its own."
        )
    return [[*row.nonzero()[:, 0].tolist(), length] for row in starts[0]]


def sample_starts(name: str, value: Tensor, batch: int, length: int) -> Tensor:
    """The first columns of samples, bool [batch, length], by one of PACKING.

    Raises:
        ValueError: it does not fit.
    """
    starts = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
    if name == "seq_idx":
        if tuple(value.shape) != (batch, length):
            raise ValueError(
                f"seq_idx has shape {list(value.shape)}; it takes the number of each token's "
                f"sample, {[batch, length]}."
            )
        starts[:, 0] = True
        starts[:, 1:] = (value.diff(dim=1) != 0).cpu()
        return starts
    bounds = value.flatten().tolist()
    if batch != 1 or bounds[:1] != [0] or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(
            f"{name} is {bounds} for input of shape {[batch, length]}; it takes the cumulative "
            f"lengths of one row's samples, from 0 to {length}."
        )
    starts[0, sorted(set(bounds[:-1]) - {length})] = True
    return starts


def counts_a_row(position_ids: Tensor, real: Tensor | None, inputs: Tensor) -> bool:
    """Whether positions count a row's real steps or its columns, from any number on."""
    batch, length = inputs.shape[:2]
    column = torch.arange(length, device=inputs.device).expand(batch, -1)
    real = torch.ones_like(column, dtype=torch.bool) if real is None else real
    constant = torch.zeros((batch,), dtype=torch.bool, device=inputs.device)
    for count in (real.cumsum(1), column):
        offset = position_ids - count
        least = offset.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1)
        most = offset.masked_fill(~real, torch.iinfo(torch.int64).min).amax(1)
        constant = constant | (least >= most)
    if torch.compiler.is_compiling():
        require(constant.all(), "position_ids restart or jump in a row, but the model is compiled.")
        return True
    return bool(constant.all())
