"""Several samples packed into one row are refused: averages would run from one into the next."""

import pytest
import torch
from hf_models import build

TOKENS = torch.arange(12)[None]
RESTART = torch.cat([torch.arange(5), torch.arange(7)])[None]
CUMULATIVE = torch.tensor([0, 5, 12], dtype=torch.int32)
PACKED = {
    "position_ids restart or jump": dict(position_ids=RESTART),
    "cu_seq_lens_q is given": dict(cu_seq_lens_q=CUMULATIVE, cu_seq_lens_k=CUMULATIVE),
    "seq_idx is given": dict(seq_idx=torch.tensor([[0] * 5 + [1] * 7])),
    "attention_mask has numbers other than": dict(attention_mask=torch.tensor([[1] * 5 + [2] * 7])),
    "with padding between": dict(
        attention_mask=torch.tensor([[1] * 5 + [0] * 2 + [1] * 5]),
        position_ids=torch.cat([torch.arange(5), torch.zeros(2).long(), torch.arange(5)])[None],
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_samples_are_refused(name):
    model, sentence = build(), name if "between" not in name else "position_ids restart or jump"
    for module in (model, model.model):
        with pytest.raises(ValueError, match=f"^{sentence}.*; "):
            module(TOKENS, **PACKED[name])


def test_what_the_flattening_collator_makes_is_refused():
    from transformers import DataCollatorWithFlattening

    samples = [{"input_ids": list(range(length))} for length in (5, 7)]
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(samples)
        with pytest.raises(ValueError, match="cannot keep packed samples apart; give every sample"):
            build()(**batch)


def test_positions_of_one_sample_change_nothing():
    model = build()
    with torch.no_grad():
        expected = model(TOKENS).logits
        for position in (torch.arange(12)[None], torch.arange(3, 15)[None]):
            assert torch.equal(model(TOKENS, position_ids=position).logits, expected)
        rows = torch.cat([TOKENS, TOKENS])
        mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
        plain = model(rows, attention_mask=mask).logits
        for position in (mask.cumsum(1) - 1, torch.arange(12).expand(2, -1)):
            given = model(rows, attention_mask=mask, position_ids=position).logits
            assert torch.equal(given, plain)
