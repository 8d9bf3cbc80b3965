"""A cache takes its last steps back, and assisted generation goes on from there."""

import random

import pytest
import torch
from hf_models import build
from mixed_models import build_mixed

from comparing import error
from megalodon_mcore.hf import MegalodonCache

MODELS = {"blocks": build, "mixed": build_mixed}
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_follows_steps_taken_back_is_what_follows_without_them(operators, make, seed):
    """Over pieces of any length, steps taken back in one go or several, tokens or embeddings."""
    draw = random.Random(seed)
    model, recorded = make(piece_length=40), draw.choice([1, 7, 64])
    cache = MegalodonCache(model.config)
    cache.activate_past_recording(recorded)
    rows, budget = torch.zeros(2, 0, dtype=torch.int64), 0
    with torch.no_grad():
        for _ in range(12):
            piece = torch.randint(64, (2, draw.choice([1, 1, 2, 9, 30, 90])))
            rows = torch.cat([rows, piece], dim=1)
            given = {"input_ids": piece}
            if draw.random() < 0.3:
                given = {"inputs_embeds": model.get_input_embeddings()(piece)}
            output = model(**given, past_key_values=cache, output_hidden_states=draw.random() < 0.3)
            whole = model(rows, use_cache=False, output_hidden_states=True)
            assert error(output.logits, whole.logits[:, -piece.shape[1] :]) < 1e-5
            for ours, theirs in zip(output.hidden_states or (), whole.hidden_states, strict=False):
                assert error(ours, theirs[:, -piece.shape[1] :]) < 1e-5
            budget = min(recorded, budget + piece.shape[1])
            while budget and draw.random() < 0.6:
                count = draw.randint(0, budget)
                budget -= count
                length = rows.shape[1] - count
                # Both of what transformers has called it: steps to remove, steps to keep.
                cache.crop(length if length and draw.random() < 0.3 else -count)
                rows = rows[:, :length]
                assert cache.get_seq_length() == length


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_assisted_generation_is_greedy_generation(make):
    model, tokens = make(), torch.randint(64, (1, 21))
    with torch.no_grad():
        # So that some of what the assistant says is right.
        assistant = make()
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    options = dict(max_new_tokens=60, **GREEDY)
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, assistant_model=assistant, **options), expected)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=5, **options), expected)


def test_some_of_what_an_assistant_says_is_right(monkeypatch):
    """Else the test above would show little."""
    removed, fed = [], []
    crop, record = MegalodonCache.crop, MegalodonCache.record
    monkeypatch.setattr(MegalodonCache, "crop", lambda c, n: (removed.append(-n), crop(c, n))[1])
    monkeypatch.setattr(
        MegalodonCache, "record", lambda c, x: (fed.append(x.shape[1]), record(c, x))[1]
    )
    test_assisted_generation_is_greedy_generation(build)
    assert 0 < sum(removed) < sum(fed)


def test_rows_reordered_between_are_not_taken_back():
    model, cache = build(), None
    with torch.no_grad():
        cache = MegalodonCache(model.config)
        cache.activate_past_recording()
        rows = torch.randint(64, (2, 20))
        model(rows, past_key_values=cache)
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        more = torch.randint(64, (2, 3))
        after = model(more, past_key_values=cache).logits
        whole = model(torch.cat([rows.flip(0)[:, :16], more], dim=1), use_cache=False).logits
    assert error(after, whole[:, 16:]) < 1e-5


def test_refusals_name_what_is_wrong():
    with torch.no_grad():
        check_refusals(build(), torch.randint(64, (1, 20)))


def check_refusals(model, rows):
    cache = model(rows).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"1 steps .* recorded 0; call activate_past_recording\(1"):
        cache.crop(-1)
    cache.activate_past_recording(8)
    assert cache.is_croppable
    model(rows, past_key_values=cache)
    with pytest.raises(ValueError, match="21 steps are to be taken back, of which .* recorded 8;"):
        cache.crop(-21)
    mask = torch.ones_like(rows)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match="attention_mask has zeros, but the cache records steps"):
        model(rows, attention_mask=mask, past_key_values=cache)
