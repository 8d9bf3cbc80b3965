"""Generation, padding, packing and training of models with layers beside the blocks."""

import copy
import json

import pytest
import torch
from mixed_models import MIXED, build_mixed
from test_hf_generation import GREEDY, greedy_by_whole_passes
from test_hf_packing import TOKENS
from test_hf_streaming import check_rows, check_turns, padded

from comparing import error
from megalodon_mcore.hf import MegalodonCache, MegalodonForCausalLM

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def attention_bytes(cache):
    states = [cache.states[layer] for layer in cache.attention]
    return sum(z.untyped_storage().nbytes() for s in states for z in (s["keys"], s["values"]))


@pytest.mark.parametrize("symbols", MIXED)
@pytest.mark.parametrize("cuts", [[1] * 40, [1, 7, 1, 20, 11], [39, 1]])
def test_pieces_equal_the_whole(operators, symbols, cuts):
    model = build_mixed(symbols)
    tokens = torch.randint(64, (3, 40))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.double()
        for cache in (MegalodonCache(model.config), MegalodonCache(model.config, max_length=40)):
            pieces = [model(z, past_key_values=cache).logits for z in tokens.split(cuts, dim=1)]
            assert error(torch.cat(pieces, dim=1), whole) < TOLERANCE
            assert cache.get_seq_length() == 40


@pytest.mark.parametrize("symbols", MIXED)
def test_greedy_with_and_without_a_cache(symbols):
    model = build_mixed(symbols, piece_length=16)
    tokens = torch.randint(64, (2, 21))
    expected = greedy_by_whole_passes(model, tokens, 30)
    for options in (
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ):
        actual = model.generate(tokens, max_new_tokens=30, **GREEDY, **options)
        assert torch.equal(actual, expected), options


@pytest.mark.parametrize("symbols", MIXED)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padded_rows_get_what_they_would_get_alone(operators, symbols, side, use_cache):
    model = build_mixed(symbols, piece_length=16)
    rows = [torch.randint(64, (length,)) for length in (50, 1, 33, 16)]
    tokens, mask = padded(rows, side, width=53)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, use_cache=use_cache).logits
    check_rows(model, rows, logits, mask)
    assert (logits[~mask.bool()] == 0).all()


@pytest.mark.parametrize("symbols", MIXED)
def test_rows_at_different_places_go_on(operators, symbols):
    """Several turns, cut differently by row."""
    model = build_mixed(symbols, piece_length=16)
    check_turns(
        model, [(30, 1, 23, 16), (3, 20, 0, 40), (1, 1, 0, 1), (1, 1, 1, 1), (30, 2, 45, 9)]
    )


def test_a_left_padded_batch_generates_what_its_rows_do_alone():
    model = build_mixed(piece_length=16)
    rows = [torch.randint(64, (length,)) for length in (30, 1, 17)]
    tokens, mask = padded(rows, "left")
    options = dict(attention_mask=mask, max_new_tokens=25, **GREEDY)
    for own in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        together = model.generate(tokens, **options, **own)
        for index, row in enumerate(rows):
            alone = greedy_by_whole_passes(model, row[None], 25)
            assert torch.equal(together[index, 30:], alone[0, len(row) :])


def test_beams_reorder_the_cache():
    model = build_mixed()
    tokens, mask = padded([torch.randint(64, (length,)) for length in (21, 12)], "left")
    options = dict(attention_mask=mask, num_beams=3, max_new_tokens=15, output_scores=True)
    options |= dict(return_dict_in_generate=True, **GREEDY)
    with_cache = model.generate(tokens, **options)
    without = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert error(with_cache.sequences_scores, without.sequences_scores.double()) < TOLERANCE


def test_rows_of_the_cache_are_selected_and_repeated():
    model = build_mixed()
    tokens, mask = padded([torch.randint(64, (length,)) for length in (30, 11)], "left")
    more, order = torch.randint(64, (3, 12)), torch.tensor([1, 0, 0])
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).past_key_values
        twice = copy.deepcopy(cache)
        cache.batch_select_indices(order)
        other = model(tokens[order], attention_mask=mask[order]).past_key_values
        one, two = (model(more, past_key_values=c).logits for c in (cache, other))
        assert error(one, two.double()) < TOLERANCE
        twice.batch_repeat_interleave(2)
        repeated = model(more[:2].repeat_interleave(2, 0), past_key_values=twice).logits
        assert error(repeated[0::2], repeated[1::2].double()) < TOLERANCE
    cache.reset()
    with torch.no_grad():
        assert torch.equal(model(more, past_key_values=cache).logits, model(more).logits)


def test_only_attention_grows_with_a_stream():
    model = build_mixed("*M-", piece_length=64)
    with torch.no_grad():
        sizes = []
        for length in (300, 600):
            cache = model(torch.randint(64, (1, length)), logits_to_keep=1).past_key_values
            size = attention_bytes(cache)
            # Two groups of six keys and six values a step, and a quarter to spare.
            assert length <= size / (2 * 2 * 6 * 4) <= 1.25 * length + 64
            others = sum(
                z.nbytes
                for n, s in enumerate(cache.states)
                if n not in cache.attention
                for z in s.values()
                if torch.is_tensor(z)
            )
            sizes.append(others)
    assert sizes[0] == sizes[1]


def test_a_cache_of_a_fixed_size_says_when_it_is_full():
    model = build_mixed()
    with pytest.raises(ValueError, match="is_compileable is set, but .*give the cache a max_len"):
        MegalodonCache(model.config, is_compileable=True)
    cache = MegalodonCache(model.config, max_length=20)
    assert cache.get_max_length() == 20
    with torch.no_grad():
        model(torch.randint(64, (1, 20)), past_key_values=cache)
        with pytest.raises(ValueError, match="was made for 20 steps and is full; make it with a"):
            model(torch.randint(64, (1, 1)), past_key_values=cache)


def test_several_rows_are_packed_each_in_its_way(operators):
    model = build_mixed("*M-")
    rows = torch.cat([TOKENS, TOKENS.flip(1)])
    positions = torch.stack(
        [
            torch.cat([torch.arange(9), torch.arange(14)]),
            torch.cat([torch.arange(20), torch.arange(3)]),
        ]
    )
    with torch.no_grad():
        both = model(rows, position_ids=positions).logits
        for row, start in ((0, 9), (1, 20)):
            alone = model(rows[row : row + 1, start:]).logits.double()
            assert error(both[row : row + 1, start:], alone) < TOLERANCE


@pytest.mark.parametrize("symbols", MIXED)
def test_gradients_go_through_the_cache(symbols):
    model = build_mixed(symbols).double()
    tokens = torch.randint(64, (2, 50))
    upstream = torch.randn(2, 50, 64, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(
        (model(tokens, use_cache=False).logits * upstream).sum(), parameters
    )
    for cache in (MegalodonCache(model.config), MegalodonCache(model.config, max_length=50)):
        pieces = [
            model(piece, past_key_values=cache).logits for piece in tokens.split([5, 20, 1, 24], 1)
        ]
        cut = torch.autograd.grad((torch.cat(pieces, dim=1) * upstream).sum(), parameters)
        for actual, expected in zip(cut, whole, strict=True):
            assert error(actual, expected) < 1e-10


@pytest.mark.parametrize("symbols", MIXED)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(symbols, use_reentrant):
    dropout = dict(dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1)
    model = build_mixed(symbols, **dropout).train()
    for parameter in model.parameters():
        # What has none is no matter here.
        parameter.grad = torch.zeros_like(parameter)
    tokens, mask = padded([torch.randint(64, (length,)) for length in (45, 25)], "left")
    inputs = dict(input_ids=tokens, labels=tokens, attention_mask=mask)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run():
        torch.manual_seed(1)
        return torch.autograd.grad(model(**inputs).loss, trained)

    expected = run()
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    if use_reentrant:
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs).loss.backward()
        actual = [p.grad for p in trained]
    else:
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("symbols", MIXED)
def test_bfloat16_is_near_and_keeps_what_stays_float32(symbols, tmp_path):
    model = build_mixed(symbols)
    tokens = torch.randint(64, (2, 30))
    with torch.no_grad():
        expected = model(tokens).logits.double()
    kept = ("cema", "norm", "query_key", "rescale", "router_bias")
    model.save_pretrained(tmp_path)
    loaded = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for narrow in (model.to(torch.bfloat16), loaded):
        for name, parameter in narrow.named_parameters():
            wide = any(part in name for part in kept)
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        with torch.no_grad():
            actual = narrow.eval()(tokens).logits
        assert actual.isfinite().all() and (actual - expected).abs().max() < expected.abs().max()
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_a_folder_ships_all_code_and_says_its_layers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build_mixed()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "layers_megalodon.py").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["layer_symbols"] == "M*ME"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    tokens = torch.randint(64, (2, 30))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_fresh_weights_are_finite_and_of_the_right_size():
    model = MegalodonForCausalLM(build_mixed().config)
    experts = model.model.layers[3].experts
    assert experts.w2.std().item() == pytest.approx((3 * 20) ** -0.5, rel=0.1)
    assert not experts.router_bias.any() and not model.model.layers[1].norm.weight.any()
    assert model(torch.randint(64, (1, 9))).logits.isfinite().all()
