"""Streams of the Hugging Face model: pieces, padding, the cache's size, gradients through it."""

import copy

import pytest
import torch
from hf_models import SHAPES, build
from mixed_models import build_mixed

from comparing import error
from megalodon_mcore.hf import MegalodonCache

TOLERANCE = 1e-5


def padded(rows, side, width=None):
    """Token rows of unequal length as one batch with its mask; the padding is token 63."""
    width = width or max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), 63)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[index, place], mask[index, place] = row, 1
    return tokens, mask


def cache_bytes(cache):
    return sum(
        state[name].untyped_storage().nbytes()
        for state in cache.states
        for name in ("mean", "var", "cema", "keys", "values")
        if name in state
    )


def check_rows(model, rows, logits, mask):
    """Asserts that what is no padding of each row is what the row gets alone."""
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(row[None], use_cache=False).logits.double()
        assert error(logits[index][mask[index].bool()], alone[0]) < TOLERANCE


def check_turns(model, turns, check_cache=lambda cache: None):
    """The cache after turns of a padded batch, each padded on its own side; asserts its logits."""
    sequences, outputs, cache = [[] for _ in turns[0]], [], None
    masks = torch.zeros(len(sequences), 0, dtype=torch.int64)
    for turn, lengths in enumerate(turns):
        rows = [torch.randint(64, (length,)) for length in lengths]
        tokens, mask = padded(rows, ["left", "right"][turn % 2])
        masks = torch.cat([masks, mask], dim=1)
        with torch.no_grad():
            output = model(tokens, attention_mask=masks, past_key_values=cache)
        cache = output.past_key_values
        outputs.append(output.logits)
        check_cache(cache)
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.append(row)
    check_rows(model, [torch.cat(z) for z in sequences], torch.cat(outputs, dim=1), masks)
    return cache


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [[1] * 90, [1, 7, 1, 20, 61], [13, 16, 8, 53], [89, 1]])
def test_pieces_equal_the_whole(name, cuts):
    model = build(name)
    tokens = torch.randint(64, (3, 90))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.double()
        cache, pieces = None, []
        for piece in tokens.split(cuts, dim=1):
            output = model(piece, past_key_values=cache)
            cache = output.past_key_values
            pieces.append(output.logits)
            assert cache_bytes(cache) <= cache_bound(model, 3)
    assert error(torch.cat(pieces, dim=1), whole) < TOLERANCE
    assert cache.get_seq_length() == 90


def cache_bound(model, batch):
    """Statistics and CEMA's states, and a chunk of keys and values."""
    config = model.config
    norm = 2 * 8 * config.norm_num_groups
    layer = norm + 8 * config.hidden_size * config.cema_ndim
    layer += 4 * config.chunk_size * (config.z_dim + config.value_dim)
    return batch * (norm + config.num_hidden_layers * layer)


@pytest.mark.parametrize("piece_length", [5, 8, 24, 100])
def test_a_long_input_is_cut_and_only_asked_for_columns_come_back(piece_length):
    model = build(piece_length=piece_length)
    tokens = torch.randint(64, (2, 90))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.double()
        output = model(tokens)
        assert error(output.logits, whole) < TOLERANCE
        last = model(tokens, logits_to_keep=1)
        assert error(last.logits, whole[:, -1:]) < TOLERANCE
        some = model(tokens, logits_to_keep=torch.tensor([3, 40, 77])).logits
        assert error(some, whole[:, [3, 40, 77]]) < TOLERANCE
        more = torch.randint(64, (2, 50))
        together = model(torch.cat([tokens, more], dim=1), use_cache=False).logits.double()
        after = model(more, past_key_values=last.past_key_values).logits
    assert error(after, together[:, 90:]) < TOLERANCE


def test_memory_of_a_long_stream_does_not_grow():
    model = build(piece_length=64)
    widths = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape))
    with torch.no_grad():
        cache = model(torch.randint(64, (1, 5000)), logits_to_keep=1).past_key_values
        assert cache_bytes(cache) <= cache_bound(model, 1)
        reference = cache_bytes(model(torch.randint(64, (1, 8)), logits_to_keep=1).past_key_values)
        assert cache_bytes(cache) == reference
    assert max(shape[1] for shape in widths) == 64


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padded_rows_get_what_they_would_get_alone(name, side, use_cache):
    model = build(name, piece_length=16)
    rows = [torch.randint(64, (length,)) for length in (50, 1, 33, 16)]
    tokens, mask = padded(rows, side, width=53)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, use_cache=use_cache).logits
        last = model(tokens, attention_mask=mask, use_cache=use_cache, logits_to_keep=4).logits
    assert torch.equal(last, logits[:, -4:])
    check_rows(model, rows, logits, mask)
    assert (logits[~mask.bool()] == 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_rows_at_different_places_in_their_chunks_go_on(name):
    """Several turns, cut differently by row."""
    model = build(name, piece_length=16)
    turns = [(50, 1, 33, 16), (3, 20, 0, 40), (1, 1, 1, 1), (30, 2, 45, 9), (1, 1, 1, 1)]

    def check_cache(cache):
        assert cache_bytes(cache) <= cache_bound(model, 4)

    cache = check_turns(model, turns, check_cache)
    assert cache.seen.tolist() == [sum(column) for column in zip(*turns, strict=True)]


@pytest.mark.parametrize("make", [build, build_mixed], ids=["blocks", "other layers"])
def test_what_stands_in_the_padding_does_not_matter(make):
    model = make()
    embeddings = model.get_input_embeddings()(torch.randint(64, (2, 40)))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :25] = 0
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=mask).logits
        embeddings[0, :25] = float("nan")
        actual = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(actual, expected)


def test_selected_rows_of_the_cache_are_what_those_rows_alone_would_leave():
    model = build()
    rows = [torch.randint(64, (length,)) for length in (30, 11, 21)]
    tokens, mask = padded(rows, "left")
    order = torch.tensor([2, 0, 0])
    more = torch.randint(64, (3, 12))
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).past_key_values
        twice = copy.deepcopy(cache)
        cache.batch_select_indices(order)
        expected = model(tokens[order], attention_mask=mask[order]).past_key_values
        ones = torch.ones_like(more)
        one, other = (
            model(more, attention_mask=ones, past_key_values=c).logits for c in (cache, expected)
        )
        assert error(one, other.double()) < TOLERANCE
        twice.batch_repeat_interleave(2)
        assert twice.seen.tolist() == [30, 30, 11, 11, 21, 21]
        repeated = model(more.repeat_interleave(2, 0), past_key_values=twice).logits
        assert error(repeated[0::2], repeated[1::2].double()) < TOLERANCE
    cache.reset()
    with torch.no_grad():
        fresh = model(more, past_key_values=cache).logits
        assert torch.equal(fresh, model(more).logits)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_go_through_the_cache(name):
    model = build(name).double()
    tokens = torch.randint(64, (2, 90))
    upstream = torch.randn(2, 90, 64, dtype=torch.float64)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(
        (model(tokens, use_cache=False).logits * upstream).sum(), parameters
    )
    cache, pieces = MegalodonCache(model.config), []
    for piece in tokens.split([5, 40, 1, 44], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    cut = torch.autograd.grad((torch.cat(pieces, dim=1) * upstream).sum(), parameters)
    for actual, expected in zip(cut, whole, strict=True):
        assert error(actual, expected) < 1e-10


def test_gradients_of_a_padded_batch_are_the_rows_gradients():
    model = build().double()
    rows = [torch.randint(63, (length,)) for length in (40, 17)]
    tokens, mask = padded(rows, "left")
    upstream = torch.randn(2, 40, 64, dtype=torch.float64)
    parameters = list(model.parameters())
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    together = torch.autograd.grad((logits * upstream).sum(), parameters)
    alone = [torch.zeros_like(p) for p in parameters]
    for index, row in enumerate(rows):
        logits = model(row[None], use_cache=False).logits
        total = (logits[0] * upstream[index, -len(row) :]).sum()
        for sum_, part in zip(alone, torch.autograd.grad(total, parameters), strict=True):
            sum_ += part
    for actual, expected in zip(together, alone, strict=True):
        assert error(actual, expected) < 1e-11


def test_hidden_states():
    model = build(piece_length=8)
    tokens, mask = padded([torch.randint(64, (30,)), torch.randint(64, (20,))], "left")
    with torch.no_grad():
        output = model.model(tokens, attention_mask=mask, output_hidden_states=True)
        states, last = output.hidden_states, output.last_hidden_state
        assert len(states) == model.config.num_hidden_layers + 1
        assert torch.equal(states[-1], last)
        real = mask.bool()
        assert torch.equal(states[0][real], model.get_input_embeddings()(tokens)[real])
        alone = model.model(tokens[1:, 10:], output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, alone, strict=True):
        assert error(ours[1:, 10:], theirs.double()) < TOLERANCE


def test_refusals_name_what_is_wrong():
    from transformers import DynamicCache

    model = build()
    tokens = torch.randint(64, (2, 10))
    cache = model(tokens).past_key_values
    for arguments, message in (
        (dict(input_ids=tokens, past_key_values=DynamicCache()), "past_key_values is a DynamicC"),
        (dict(input_ids=tokens[:1], past_key_values=cache), "has 1 rows and past_key_values 2"),
        (dict(input_ids=tokens[:, :0]), "input_ids is empty"),
        (dict(), "Give input_ids or inputs_embeds"),
        (
            dict(input_ids=tokens, attention_mask=tokens[:, :4]),
            r"attention_mask has shape \[2, 4\]",
        ),
        (dict(input_ids=tokens, attention_mask=tokens[:, None, None]), "attention_mask has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
