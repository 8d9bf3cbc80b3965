"""chunked_attention's Triton kernels, interpreted, against the float64 oracle.

The interpreter multiplies in float32 on the CPU, whatever input_precision says, and cuts digits
off where a card rounds to bfloat16.
"""

import pytest
import torch

from comparing import BFLOAT16, error, poisoned
from megalodon_mcore.kernels.chunked_attention import (
    AttentionState,
    chunked_attention,
    chunked_attention_naive,
)
from test_chunked_attention import FLOAT32, draws_for, random_inputs, run

pytestmark = pytest.mark.interpreted
# Weights and their gradients are bfloat16, too, before they meet the values.
BFLOAT16_WEIGHTS = 2.5 * BFLOAT16


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    from megalodon_mcore.kernels.chunked_attention import triton

    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    return triton


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """So small that little sequences have whole, ragged, first and last tiles of every side."""
    tiles = kernels.Tiles(
        forward=kernels.Tile(32, 16, 32, 16, 4, 2),
        scores=kernels.Tile(32, 32, 32, 16, 4, 2),
        product=kernels.Tile(16, 16, 32, 16, 4, 2),
    )
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, {0: tiles}))


SHAPES = [
    # batch, length, heads, dk, dv, chunk_size, cached
    (1, 1, 1, 1, 1, 1, None),
    (2, 19, 3, 5, 7, 6, None),
    (2, 19, 2, 5, 7, 6, 0),
    (2, 19, 2, 5, 7, 6, 4),
    (1, 3, 2, 4, 9, 8, 2),
    (2, 7, 2, 3, 5, 100, None),
    (2, 0, 2, 3, 5, 4, 3),
    (1, 150, 1, 20, 70, 64, None),
    (1, 128, 1, 16, 64, 64, None),
    (2, 100, 1, 33, 40, 77, 60),
    (1, 90, 2, 16, 33, 48, 33),
]


def compare(arguments, dtype=torch.float32, tolerance=FLOAT32):
    batch, length, heads, dk, dv, chunk_size, cached = arguments
    torch.manual_seed(length)
    q, k, v, state = random_inputs(batch, length, heads, dk, dv, cached, dtype)
    draws = draws_for(q, v, chunk_size, cached)
    actual = run(chunked_attention, q, k, v, chunk_size, state, draws)
    wanted = run(chunked_attention_naive, q, k, v, chunk_size, state, draws, torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        assert error(a, w) < tolerance


@pytest.mark.parametrize("arguments", SHAPES, ids=str)
def test_matches_the_oracle(small_tiles, arguments):
    compare(arguments)


def test_a_workspace_for_two_chunks_at_a_time(kernels, small_tiles, monkeypatch):
    """Three heads of 1 to 3 chunks: groups that begin and end inside a row, and a smaller last."""
    monkeypatch.setattr(kernels, "WORKSPACE", 2 * 2 * 32 * 32 * 4)
    compare((1, 75, 3, 5, 7, 30, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_oracle_with_the_tiles_of_real_sizes(dtype):
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16_WEIGHTS
    compare((1, 300, 1, 64, 520, 140, 9), dtype, tolerance)


def test_bfloat16(small_tiles):
    compare((2, 70, 2, 8, 64, 32, 5), torch.bfloat16, BFLOAT16_WEIGHTS)


@pytest.mark.parametrize("strides", ["sliced", "expanded", "columns apart"])
def test_strides(small_tiles, strides):
    torch.manual_seed(0)
    q, k, v, _ = random_inputs(2, 40, 2, 6, 20)
    if strides == "sliced":
        q, k, v = (
            torch.stack([z, z + 1], 1).repeat(1, 1, 1, 1, 2)[:, 0, ..., 3:] for z in (q, k, v)
        )
    elif strides == "expanded":
        q, k, v = (z[:1].expand(2, -1, -1, -1) for z in (q, k, v))
    else:
        q, k, v = (z.transpose(1, 3).contiguous().transpose(1, 3) for z in (q, k, v))
    draws = torch.randn_like(v)
    results = []
    for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        leaves = [z.detach().requires_grad_() for z in inputs]
        out, _ = chunked_attention(*leaves, 24)
        results.append([out, *torch.autograd.grad(out, leaves, draws)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_pieces_equal_the_whole(small_tiles):
    torch.manual_seed(0)
    q, k, v, _ = random_inputs(2, 50, 1, 4, 20)
    whole, end = chunked_attention(q, k, v, 20, return_state=True)
    outputs, state = [], None
    for start, stop in [(0, 1), (1, 17), (17, 40), (40, 50)]:
        piece = (z[:, start:stop] for z in (q, k, v))
        out, state = chunked_attention(*piece, 20, state, return_state=True)
        outputs.append(out)
    assert error(torch.cat(outputs, 1), whole) < FLOAT32
    for a, b in zip(state, end, strict=True):
        assert torch.equal(a, b)
        assert a.untyped_storage().nbytes() == a.numel() * a.element_size()


def dropped_weights(q, k, chunk_size, state, p, seed):
    """The softmax weights after dropout [batch, queries, keys], shown by values of unit rows."""
    cached = state.key.shape[1]
    keys = cached + q.shape[1]
    unit = torch.eye(keys).expand(q.shape[0], 1, keys, keys).transpose(1, 2)
    torch.manual_seed(seed)
    shown = AttentionState(state.key, unit[:, :cached])
    return chunked_attention(q, k, unit[:, cached:], chunk_size, shown, p)[0][:, :, 0]


@pytest.mark.parametrize("p", [0.3, 1e-10])
def test_dropout_has_the_gradients_of_its_mask(small_tiles, p):
    """Against the oracle's equations in float64 with the mask that was drawn."""
    torch.manual_seed(0)
    chunk_size, cached = 40, 7
    q, k, v, state = random_inputs(2, 90, 1, 5, 36, cached)
    draws = torch.randn_like(v)
    keep = dropped_weights(q, k, chunk_size, state, p, 3) != 0

    leaves = [z.detach().requires_grad_() for z in (q, k, v, *state)]
    torch.manual_seed(3)
    out, _ = chunked_attention(*leaves[:3], chunk_size, AttentionState(*leaves[3:]), p)
    actual = [out, *torch.autograd.grad(out, leaves, draws)]

    doubles = [z.detach().double().requires_grad_() for z in (q, k, v, *state)]
    keys, values = (
        torch.cat(pair, 1)[:, :, 0] for pair in zip(doubles[3:], doubles[1:3], strict=True)
    )
    at, to = torch.arange(cached + 90)[:, None], torch.arange(cached + 90)
    seen = ((to <= at) & (to // chunk_size == at // chunk_size))[cached:]
    scores = (doubles[0][:, :, 0] @ keys.mT).masked_fill(~seen, -torch.inf)
    wanted = ((scores.softmax(-1) * keep / (1 - p)) @ values)[:, :, None]
    wanted = [wanted, *torch.autograd.grad(wanted, doubles, draws.double())]
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w) < FLOAT32
    share = keep[:, seen].double().mean()
    five_deviations = 5 * (p * (1 - p) / (2 * seen.sum())) ** 0.5
    assert abs(share - (1 - p)) <= five_deviations


def test_dropout_follows_the_generator(small_tiles):
    torch.manual_seed(0)
    q, k, _, state = random_inputs(2, 90, 1, 5, 36, 7)
    first, again, other = (dropped_weights(q, k, 40, state, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Neither rows nor chunks have the same mask.
    kept = first != 0
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 33:66, 40:73], kept[0, 73:, 80:][:33, :33])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_uninitialised_memory_is_read_and_twice_gives_the_same(small_tiles, p):
    torch.manual_seed(0)
    q, k, v, state = random_inputs(2, 70, 2, 4, 36, 3)
    draws = draws_for(q, v, 40, 3)
    with poisoned():
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            results.append(run(chunked_attention, q, k, v, 40, state, draws, dropout_p=p))
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


def test_what_cannot_be_seen_is_not_read(small_tiles):
    """NaN in the keys and values of other chunks and of the future stays where it is."""
    torch.manual_seed(0)
    q, k, v, _ = random_inputs(1, 80, 1, 4, 20)
    out, _ = chunked_attention(q, k, v, 30)
    k[:, 60:], v[:, 60:] = torch.nan, torch.nan
    poisoned, _ = chunked_attention(q, k, v, 30)
    assert torch.equal(out[:, :60], poisoned[:, :60])


def test_tiles_follow_shared_memory(kernels, monkeypatch):
    q = torch.empty(1, 1, 1, 256, dtype=torch.bfloat16)
    chosen = []
    for kibibytes in (228, 164, 100, 64):
        monkeypatch.setattr(kernels, "shared_memory", lambda device, k=kibibytes: k * 1024)
        chosen.append(kernels.Tiles.of(q, 2048, 2048, False).forward)
    assert chosen[2] == chosen[3] and len(set(chosen)) == 3
