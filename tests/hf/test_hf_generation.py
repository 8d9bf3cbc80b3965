"""`generate`: with the cache as without it, for padded batches, beams and continued caches."""

import itertools

import pytest
import torch
from hf_models import SHAPES, build

from comparing import error

GREEDY = dict(do_sample=False)


def greedy_by_whole_passes(model, tokens, steps):
    for _ in range(steps):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_with_and_without_a_cache_across_chunks(name):
    model = build(name, piece_length=16)
    tokens = torch.randint(64, (2, 21))
    expected = greedy_by_whole_passes(model, tokens, 40)
    with torch.no_grad():
        logits = model(expected, use_cache=False).logits[:, 20:-1].double()
    for options in (
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ):
        actual = model.generate(
            tokens,
            max_new_tokens=40,
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
            **options,
        )
        assert torch.equal(actual.sequences, expected), options
        assert error(torch.stack(actual.logits, dim=1), logits) < 1e-5, options


def test_a_left_padded_batch_generates_what_its_rows_do_alone():
    model = build(piece_length=16)
    rows = [torch.randint(64, (1, length)) for length in (30, 1, 17)]
    tokens = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (30 - row.shape[1]) + [1] * row.shape[1] for row in rows])
    for use_cache in (True, False):
        together = model.generate(
            tokens, attention_mask=mask, max_new_tokens=25, use_cache=use_cache, **GREEDY
        )
        for index, row in enumerate(rows):
            alone = greedy_by_whole_passes(model, row, 25)
            assert torch.equal(together[index, 30:], alone[0, row.shape[1] :])


def test_generation_goes_on_from_the_cache_it_returned():
    model = build()
    tokens = torch.randint(64, (2, 21))
    expected = greedy_by_whole_passes(model, tokens, 30)
    first = model.generate(tokens, max_new_tokens=12, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.get_seq_length() == 32
    second = model.generate(first.sequences, past_key_values=cache, max_new_tokens=18, **GREEDY)
    assert torch.equal(second, expected)


def test_generation_from_embeddings():
    model = build("tied-scaled-four-heads")
    tokens = torch.randint(64, (2, 21))
    embeddings = model.get_input_embeddings()(tokens)
    actual = model.generate(inputs_embeds=embeddings, max_new_tokens=20, **GREEDY)
    assert torch.equal(actual, greedy_by_whole_passes(model, tokens, 20)[:, 21:])


def test_beams_reorder_the_cache():
    model = build()
    tokens = torch.randint(64, (3, 21))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    options = dict(
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=20,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    with_cache = model.generate(tokens, **options)
    without = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert error(with_cache.sequences_scores, without.sequences_scores.double()) < 1e-5


def test_as_many_beams_as_tokens_find_the_best_continuation_of_two():
    model = build(vocab_size=6)
    tokens = torch.randint(6, (1, 15))
    found = model.generate(tokens, num_beams=6, max_new_tokens=2, **GREEDY)[0, 15:].tolist()

    def score(pair):
        sequence = torch.cat([tokens, torch.tensor([pair])], dim=1)
        with torch.no_grad():
            logits = model(sequence, use_cache=False).logits[0].log_softmax(-1)
        return (logits[14, pair[0]] + logits[15, pair[1]]).item()

    assert found == list(max(itertools.product(range(6), repeat=2), key=score))


def test_samples_of_one_prompt_are_independent_rows():
    model = build()
    tokens = torch.randint(64, (1, 21))
    torch.manual_seed(0)
    samples = model.generate(tokens, do_sample=True, num_return_sequences=3, max_new_tokens=20)
    assert samples.shape == (3, 41) and len({tuple(row.tolist()) for row in samples}) == 3


def test_other_caches_and_batching_are_refused():
    model = build()
    tokens = torch.randint(64, (1, 21))
    with pytest.raises(ValueError, match="cache_implementation is 'quantized'; Megal"):
        model.generate(tokens, cache_implementation="quantized", max_new_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="generate_batch pages keys and values, .*; call generate"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="generate_batch pages keys and values"):
        model.init_continuous_batching()
