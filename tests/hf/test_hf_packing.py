"""Several samples packed into one row each get what they get alone, gradients included."""

import pytest
import torch
from hf_models import build
from mixed_models import build_mixed

from comparing import error

TOKENS = torch.arange(1, 24)[None]
LENGTHS = (5, 1, 12, 5)
CUMULATIVE = torch.tensor([0, 5, 6, 18, 23], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
INDICES = torch.cat([torch.full((length,), n) for n, length in enumerate(LENGTHS)])[None]
PACKED = {
    "position_ids": dict(position_ids=POSITIONS),
    "cu_seq_lens": dict(cu_seq_lens_q=CUMULATIVE, cu_seq_lens_k=CUMULATIVE),
    "seq_idx": dict(seq_idx=INDICES),
    "all": dict(position_ids=POSITIONS, cu_seq_lens_q=CUMULATIVE, seq_idx=INDICES),
}
WRONG = {
    "attention_mask has numbers other than": dict(attention_mask=INDICES + 1),
    "attention_mask has zeros and the rows hold packed": dict(
        attention_mask=torch.tensor([[1] * 22 + [0]]), cu_seq_lens_q=CUMULATIVE
    ),
    "position_ids jump": dict(position_ids=POSITIONS.where(POSITIONS < 7, POSITIONS + 2)),
    "position_ids, cu_seq_lens_q.* disagree": dict(
        position_ids=POSITIONS, seq_idx=torch.zeros_like(POSITIONS)
    ),
    "cu_seq_lens_q is .*from 0 to 23": dict(cu_seq_lens_q=CUMULATIVE[:-1]),
    "cu_seqlens is .*from 0 to 23": dict(cu_seqlens=CUMULATIVE[1:]),
    "seq_idx has shape": dict(seq_idx=INDICES[:, 1:]),
    r"position_ids is torch.int64 of shape \[1, 1, 23\]": dict(position_ids=POSITIONS[None]),
    "position_ids is torch.bool": dict(position_ids=POSITIONS > 0),
    r"attention_mask has shape \[2, 23\]": dict(attention_mask=torch.ones(2, 23).long()),
    "samples are packed into a row, which no cache": dict(position_ids=POSITIONS, use_cache=True),
}


def loss_and_logits(model, **given):
    output = model(**given, labels=given["input_ids"], output_hidden_states=True)
    return output.loss, output.logits, output.hidden_states


@pytest.mark.parametrize("make", [build, build_mixed], ids=["blocks", "other layers"])
@pytest.mark.parametrize("marks", PACKED.values(), ids=PACKED)
def test_packed_samples_get_what_they_get_alone(operators, marks, make):
    packed, alone = make().train(), make().train()
    loss, logits, states = loss_and_logits(packed, input_ids=TOKENS, **marks)
    loss.backward()
    targets = [length - 1 for length in LENGTHS]
    total, parts = 0, []
    for tokens, count in zip(TOKENS.split(LENGTHS, dim=1), targets, strict=True):
        if count:
            own, part, own_states = loss_and_logits(alone, input_ids=tokens)
            total = total + own * count / sum(targets)
        else:
            output = alone(tokens, output_hidden_states=True)
            part, own_states = output.logits, output.hidden_states
        parts.append((part, *own_states))
    total.backward()
    for whole, *pieces in zip((logits, *states), *parts, strict=True):
        assert error(whole, torch.cat(pieces, dim=1)) < 1e-5
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for (name, parameter), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        # A router's bias is moved by no gradient.
        if parameter.requires_grad:
            assert error(parameter.grad, other.grad) < 1e-4, name


def test_several_rows_are_packed_each_in_its_way(operators):
    model, rows = build().eval(), torch.cat([TOKENS, TOKENS.flip(1)])
    other = torch.cat([torch.arange(20), torch.arange(3)])[None]
    with torch.no_grad():
        both = model(rows, position_ids=torch.cat([POSITIONS, other])).logits
        assert error(both[:1], model(TOKENS, position_ids=POSITIONS).logits) < 1e-5
        assert error(both[1:, 20:], model(rows[1:, 20:]).logits) < 1e-5


def test_what_the_flattening_collator_makes_trains(operators):
    from transformers import DataCollatorWithFlattening

    model = build().train()
    samples = [{"input_ids": list(range(1, 1 + length))} for length in (5, 7)]
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(samples)
        losses = [
            model(row, labels=row).loss.item() * (row.shape[1] - 1)
            for row in (torch.tensor([sample["input_ids"]]) for sample in samples)
        ]
        assert model(**batch).loss.item() == pytest.approx(sum(losses) / 10, rel=1e-5)


@pytest.mark.parametrize("sentence", WRONG)
def test_marks_that_cannot_be_are_refused(sentence):
    model = build()
    for module in (model, model.model):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            module(TOKENS, **WRONG[sentence])


def test_positions_of_one_sample_change_nothing(operators):
    model = build()
    with torch.no_grad():
        expected = model(TOKENS).logits
        for position in (torch.arange(23)[None], torch.arange(3, 26)[None]):
            assert torch.equal(model(TOKENS, position_ids=position).logits, expected)
        whole = torch.tensor([0, 23], dtype=torch.int32)
        for marks in (dict(cu_seq_lens_q=whole), dict(seq_idx=torch.zeros_like(TOKENS))):
            assert torch.equal(model(TOKENS, use_cache=True, **marks).logits, expected)
        rows = torch.cat([TOKENS, TOKENS])
        mask = torch.tensor([[1] * 23, [0] * 4 + [1] * 19])
        plain = model(rows, attention_mask=mask).logits
        for position in (mask.cumsum(1) - 1, torch.arange(23).expand(2, -1)):
            given = model(rows, attention_mask=mask, position_ids=position).logits
            assert torch.equal(given, plain)
