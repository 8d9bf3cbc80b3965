"""What was read goes into a file and comes back, bit for bit; other files are refused."""

import random

import pytest
import torch
from hf_models import SHAPES, build
from mixed_models import MIXED, build_mixed
from safetensors.torch import load_file, save_file

from megalodon_mcore.hf import MegalodonCache
from megalodon_mcore.hf.state_file import load_state, save_state

NOTHING, ONES = torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 13, dtype=torch.int64)


def make(name):
    return build(name) if name in SHAPES else build_mixed(name)


def read(model, rows, **arguments):
    with torch.no_grad():
        return model(rows, **arguments)


@pytest.mark.parametrize("length", [1, 8, 13, 50])
@pytest.mark.parametrize("name", [*SHAPES, *MIXED])
def test_what_follows_is_bit_for_bit_what_it_would_be(name, length, tmp_path):
    model = make(name)
    rows, more = torch.randint(64, (2, length)), torch.randint(64, (2, 20))
    cache = read(model, rows).past_key_values
    save_state(tmp_path / "state", model, cache, rows[:, -1:])
    back, next_tokens = load_state(tmp_path / "state", model)
    assert torch.equal(next_tokens, rows[:, -1:])
    for piece in (more[:, :1], more[:, 1:]):
        ours = read(model, piece, past_key_values=back).logits
        assert torch.equal(ours, read(model, piece, past_key_values=cache).logits)


def test_rows_of_different_lengths(tmp_path):
    model = build_mixed()
    rows, mask = torch.randint(64, (3, 30)), torch.ones(3, 30, dtype=torch.int64)
    mask[0, :11], mask[2, :29] = 0, 0
    cache = read(model, rows, attention_mask=mask).past_key_values
    save_state(tmp_path / "state", model, cache, NOTHING)
    back = load_state(tmp_path / "state", model).cache
    more = torch.randint(64, (3, 9))
    expected = read(model, more, past_key_values=cache).logits
    assert torch.equal(read(model, more, past_key_values=back).logits, expected)


def test_generation_goes_on(tmp_path):
    """With and without room for good."""
    model, rows = build_mixed(), torch.randint(64, (1, 21))
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(rows, **options)[:, 21:]
    cache = read(model, rows[:, :10]).past_key_values
    save_state(tmp_path / "state", model, cache, rows[:, 10:11])
    for max_length in (None, 40):
        back, next_tokens = load_state(tmp_path / "state", model, max_length=max_length)
        given = torch.cat([next_tokens, rows[:, 11:]], dim=1)
        made = model.generate(given, past_key_values=back, **options)
        assert torch.equal(made[:, given.shape[1] :], expected)


def test_a_file_does_not_grow_with_the_text_nor_hold_what_is_out_of_reach(tmp_path):
    model = build(chunk_size=8)
    sizes = []
    for length in (16, 800):
        cache = read(model, torch.randint(64, (2, length))).past_key_values
        for state in cache.states[:-1]:
            # A new chunk begins, and looks at no slot of the last.
            state["keys"].fill_(torch.nan)
        path = tmp_path / str(length)
        save_state(path, model, cache, NOTHING)
        sizes.append(path.stat().st_size)
        assert not any(z.isnan().any() for z in load_file(path).values())
    assert sizes[0] == sizes[1]


def test_a_file_of_another_model_is_refused(tmp_path):
    model = build()
    save_state(tmp_path / "state", model, read(model, ONES).past_key_values, NOTHING)
    trained, narrow = build(), build().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-6)
    for other in (trained, narrow, build(rope_theta=5e5), build("one-head"), build_mixed()):
        with pytest.raises(ValueError, match="state was written by another model, or by"):
            load_state(tmp_path / "state", other)
    assert load_state(tmp_path / "state", build(dropout=0.1)).next_tokens.shape == (2, 0)


def test_damaged_files_are_refused_in_a_sentence(tmp_path):
    model, path, bad = build(), tmp_path / "state", tmp_path / "bad"
    save_state(path, model, read(model, ONES).past_key_values, NOTHING)
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    changed = [b"", whole[:5], whole[:header], whole[:-1], whole + b"x", bytes(len(whole))]
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        changed.append(bytes(flipped))
    for content in changed:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad (is damaged|is no state|was written by another)"):
            load_state(bad, model)
    save_file({"seen": torch.zeros(2)}, bad)
    with pytest.raises(ValueError, match="bad is no state of a Megalodon"):
        load_state(bad, model)
    with pytest.raises(FileNotFoundError, match="missing is no file"):
        load_state(tmp_path / "missing", model)


def test_what_cannot_be_saved_leaves_no_file(tmp_path):
    model, path = build(), tmp_path / "state"
    cache = MegalodonCache(model.config)
    with pytest.raises(ValueError, match="The cache was fed nothing"):
        save_state(path, model, cache, NOTHING)
    cache.activate_past_recording()
    read(model, ONES, past_key_values=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="steps taken back since; feed it"):
        save_state(path, model, cache, NOTHING)
    assert not list(tmp_path.iterdir())
