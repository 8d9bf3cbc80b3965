"""What chunked_attention's Triton kernels alone have: groups, masks of their own, sizes of tiles.

The interpreter multiplies in float32 on the CPU, whatever input_precision says.
"""

import pytest
import torch
from megalodon_mcore.kernels.chunked_attention import AttentionState, chunked_attention
from megalodon_mcore.kernels.segments import Segment, Segments

from comparing import error
from test_chunked_attention import FLOAT32, compare, inputs, use_small_tiles

pytestmark = pytest.mark.interpreted
# Of three rows, the second of two documents: parts of all kinds.
TABLE = [Segment(0, 0, 75, 8), Segment(1, 0, 40, 0), Segment(1, 40, 35, 31)]
SEGMENTS = Segments(75, 2, TABLE)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    from megalodon_mcore.kernels.chunked_attention import triton

    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    use_small_tiles(monkeypatch)
    return triton


def test_a_workspace_for_two_chunks_at_a_time(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "WORKSPACE", 3 * 2 * 2 * 32 * 32 * 4)
    compare(SEGMENTS, 3, 5, 7, 30)


def dropped_weights(q, k, state, chunk_size, p, seed):
    """The softmax weights after dropout [batch, queries, keys and those of the state]."""
    length, batch, held = len(q), q.shape[1], len(state.key)
    unit = torch.eye(held + length)[:, None]
    v = unit[held:, None].expand(-1, batch, 1, -1)
    torch.manual_seed(seed)
    state = AttentionState(state.key, unit[:held])
    return chunked_attention(q, k, v, chunk_size, SEGMENTS, state, p)[0][:, :, 0].transpose(0, 1)


@pytest.mark.parametrize("p", [0.3, 1e-10])
def test_dropout_has_the_gradients_of_its_mask(p):
    """Against the equations in float64 with the mask that was drawn."""
    torch.manual_seed(0)
    given = inputs(SEGMENTS, 1, 5, 36, 40)
    draws = torch.randn_like(given[2])
    keep = dropped_weights(*given[:2], AttentionState(*given[3:]), 40, p, 3) != 0

    leaves = [z.detach().requires_grad_() for z in given]
    torch.manual_seed(3)
    out, _ = chunked_attention(*leaves[:3], 40, SEGMENTS, AttentionState(*leaves[3:]), p)
    actual = [out, *torch.autograd.grad(out, leaves, draws)]

    doubles = [z.detach().double().requires_grad_() for z in given]
    wanted, seen_of_rows, used = [], [], 0
    for row in range(2):
        q, k, v = (z[:, row, 0] for z in doubles[:3])
        keys, values = (
            torch.cat([z[:, 0], own]) for z, own in zip(doubles[3:], (k, v), strict=True)
        )
        held = len(doubles[3])
        seen = torch.zeros(75, held + 75, dtype=torch.bool)
        for segment in (z for z in SEGMENTS if z.row == row):
            begun = segment.position % 40
            # Positions that the segment's first chunk has, in the state and in the row.
            places = [*range(used, used + begun)]
            places += [held + t for t in range(segment.start, segment.start + segment.length)]
            used += begun
            for t in range(segment.length):
                last = begun + t
                seen[segment.start + t, places[last - last % 40 : last + 1]] = True
        scores = (q @ keys.mT).masked_fill(~seen, -torch.inf)
        wanted.append((scores.softmax(-1) * keep[row] / (1 - p)) @ values)
        seen_of_rows.append(seen)
    wanted = torch.stack(wanted, 1)[:, :, None]
    wanted = [wanted, *torch.autograd.grad(wanted, doubles, draws.double())]
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w) < FLOAT32
    seen = torch.stack(seen_of_rows)
    share = keep[seen].double().mean()
    assert abs(share - (1 - p)) <= 5 * (p * (1 - p) / seen.sum()) ** 0.5


def test_neither_chunks_nor_documents_have_the_same_mask():
    torch.manual_seed(0)
    q, k, _, *state = inputs(SEGMENTS, 1, 5, 36, 40)
    kept = dropped_weights(q, k, AttentionState(*state), 40, 0.3, 1) != 0
    held = len(state[0])
    second_chunk, other_document = kept[0, 32:62, held + 32 :][:, :30], kept[1, :30, held:][:, :30]
    assert not torch.equal(second_chunk, other_document)
    assert not torch.equal(second_chunk, kept[0, 72:, held + 72 :][:3])


def test_tiles_follow_shared_memory(kernels, monkeypatch):
    monkeypatch.undo()
    q = torch.empty(1, 1, 1, 256, dtype=torch.bfloat16)
    chosen = []
    for kibibytes in (228, 164, 100, 64):
        monkeypatch.setattr(kernels, "shared_memory", lambda device, k=kibibytes: k * 1024)
        chosen.append(kernels.Tiles.of(q, 2048, 2048, False).weights)
    assert chosen[2] == chosen[3] and len(set(chosen)) == 3
