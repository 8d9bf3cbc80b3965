"""chunked_attention against its float64 oracle, portable and in Triton's interpreter."""

import pytest
import torch
from megalodon_mcore.kernels.chunked_attention import (
    AttentionState,
    chunked_attention,
    chunked_attention_naive,
    portable,
)
from megalodon_mcore.kernels.segments import Segment, Segments

from comparing import BFLOAT16, error, poisoned, random_segments

PACKAGE, TILES = "chunked_attention", {}
FLOAT32 = 3e-6
# Weights and their gradients are rounded, too, before they meet the values.
ERRORS = {torch.float32: FLOAT32, torch.bfloat16: 2.5 * BFLOAT16, torch.float16: 2**-9}
ERRORS[torch.float64] = 1e-13
rows = Segments.of_rows


def use_small_tiles(monkeypatch):
    """So small that little chunks have whole, ragged, first and last ones."""
    from megalodon_mcore.kernels.chunked_attention import triton as kernels

    tiles = kernels.Tiles(
        weights=kernels.Tile(16, 16, 32, 16, 4, 2),
        scores=kernels.Tile(32, 32, 32, 16, 4, 2),
        product=kernels.Tile(16, 16, 32, 16, 4, 2),
    )
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, {0: tiles}))


@pytest.fixture
def small(path, monkeypatch):
    """The path, with small tiles or blocks of queries."""
    monkeypatch.setattr(portable, "QUERY_BLOCK", 8)
    if path == "triton":
        use_small_tiles(monkeypatch)
    return path


def inputs(segments, heads, dk, dv, chunk_size, dtype=torch.float32):
    """q, k and v in segments, and the keys and values that these go on with."""
    steps, begun = (segments.length, segments.batch), (segments.begun(chunk_size),)
    shapes = [(*at, heads, d) for at in (steps, begun) for d in (dk, dv)]
    return [torch.randn(shape).to(dtype) for shape in (shapes[0], *shapes)]


def run(function, given, chunk_size, segments, draws=None, dtype=None, **keywords):
    """Outputs, then gradients of q, k, v and the state, of a loss weighed by `draws`."""
    leaves = [z.detach().to(dtype or z.dtype).requires_grad_() for z in given]
    state = AttentionState(*leaves[3:]) if leaves[3:] else None
    out, new = function(*leaves[:3], chunk_size, segments, state, return_state=True, **keywords)
    values = [out, *new]
    draws = draws or [torch.ones_like(z) for z in values]
    loss = sum((z.double() * d.double()).sum() for z, d in zip(values, draws, strict=True))
    return [*values, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def compare(segments, heads, dk, dv, chunk_size, dtype=torch.float32):
    torch.manual_seed(0)
    given = inputs(segments, heads, dk, dv, chunk_size, dtype)
    left = sum((z.position + z.length) % chunk_size for z in segments)
    draws = [
        torch.randn(given[2].shape),
        torch.randn(left, heads, dk),
        torch.randn(left, heads, dv),
    ]
    draws = [z.to(dtype) for z in draws]
    with poisoned():
        actual = run(chunked_attention, given, chunk_size, segments, draws)
    wanted = run(chunked_attention_naive, given, chunk_size, segments, draws, torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        # Where everything cancels in float64, the error is one of terms of size 1.
        assert (error(a, w) if w.any() or not w.numel() else a.abs().max()) < ERRORS[dtype]


@pytest.mark.parametrize(
    ("segments", "heads", "dk", "dv", "chunk_size"),
    [
        (rows(1, 1), 1, 1, 1, 1),
        (rows(19, 2), 3, 5, 7, 6),
        (rows(19, 2, 4), 2, 5, 7, 6),
        (rows(3, 3, 21), 2, 4, 9, 8),
        (rows(9, 2), 2, 3, 5, 1),
        (rows(7, 2), 2, 3, 5, 100),
        (rows(0, 2), 2, 3, 5, 4),
        (rows(128, 1), 1, 16, 64, 64),
        (rows(90, 1, 33), 2, 16, 33, 48),
        # Of one length: they are views of one another.
        (Segments.of_documents([[0, 20, 40, 60], [0, 30, 45, 60]]), 2, 5, 7, 40),
        # All goes on: at one place, and at several.
        (Segments(60, 1, [Segment(0, s, 15, 100) for s in range(0, 60, 15)]), 2, 5, 7, 40),
        (Segments(40, 2, [Segment(0, 0, 40, 70), Segment(1, 0, 40, 3)]), 1, 5, 40, 50),
        # Steps of their own documents, before and after a long one.
        (Segments.of_documents([[*range(9), 70, 71, 72]]), 1, 4, 6, 33),
    ],
)
def test_matches_the_oracle(small, segments, heads, dk, dv, chunk_size):
    compare(segments, heads, dk, dv, chunk_size)


@pytest.mark.parametrize("seed", range(8))
def test_random_tables(small, seed):
    types = [torch.float32, torch.bfloat16, torch.float16]
    if small == "torch":
        types.append(torch.float64)
    segments = random_segments(seed, length=80 if small == "triton" else 200)
    compare(segments, 1 + seed % 2, 5, 20, (30, 64, 7)[seed % 3], types[seed % len(types)])


def test_blocks_and_tiles_of_real_sizes(path):
    segments = Segments.of_documents([[0, 150, 155]])
    for dtype in (torch.float32, torch.bfloat16):
        compare(rows(300, 1, 9), 1, *((64, 520) if path == "triton" else (16, 48)), 140, dtype)
        compare(segments, 1, 20, 32, 2048, dtype)


def test_gradcheck(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(portable, "QUERY_BLOCK", 2)
    segments = Segments(9, 1, [Segment(0, 0, 5, 2), Segment(0, 5, 4, 0)])
    given = inputs(segments, 2, 2, 2, 3, torch.float64)
    for dropout_p in (0.0, 0.4):

        def function(q, k, v, *state, dropout_p=dropout_p):
            torch.manual_seed(7)
            state = AttentionState(*state)
            out, new = chunked_attention(q, k, v, 3, segments, state, dropout_p, True)
            return out, *new

        assert torch.autograd.gradcheck(function, [z.requires_grad_() for z in given])


def test_documents_give_what_they_give_alone(small):
    """In one call each, and dealt out to three calls, whose states the next are given."""
    torch.manual_seed(0)
    lengths, chunk_size = (37, 23, 50), 20
    documents = [inputs(rows(n, 1), 2, 4, 6, chunk_size)[:3] for n in lengths]
    draws = [torch.randn(n, 1, 2, 6) for n in lengths]
    wanted = []
    for given, draw in zip(documents, draws, strict=True):
        leaves = [z.requires_grad_() for z in given]
        out = chunked_attention(*leaves, chunk_size)[0]
        wanted.append([out, *torch.autograd.grad(out, leaves, draw)])
    # Of each call the (document, start, stop) in their order: rows of 28, 2 of 25 and of 32.
    calls = [[(0, 0, 17), (1, 0, 11)], [(2, 0, 25), (1, 11, 23), (0, 17, 30)]]
    calls += [[(0, 30, 37), (2, 25, 50)]]
    widths, held, outputs = (28, 25, 32), {}, ([], [], [])
    for call, width in zip(calls, widths, strict=True):
        table, at = [], 0
        for _, start, stop in call:
            table.append(Segment(at // width, at % width, stop - start, start))
            at += stop - start
        segments = Segments(width, at // width, table)
        packed = [
            torch.cat([documents[d][i][start:stop] for d, start, stop in call])
            .view(at // width, width, 2, -1)
            .transpose(0, 1)
            for i in range(3)
        ]
        state = (
            [torch.cat([held[d][i] for d, start, _ in call if start]) for i in range(2)]
            if any(start for _, start, _ in call)
            else None
        )
        state = state and AttentionState(*state)
        out, new = chunked_attention(*packed, chunk_size, segments, state, return_state=True)
        sizes = [stop % chunk_size for _, _, stop in call]
        parts = zip(*(z.split(sizes) for z in new), strict=True)
        held |= dict(zip((d for d, _, _ in call), parts, strict=True))
        for (document, _, _), segment in zip(call, segments, strict=True):
            outputs[document].append(out[segment.steps, segment.row])
    for given, draw, parts, (out, *grads) in zip(documents, draws, outputs, wanted, strict=True):
        whole = torch.cat(parts)[:, None]
        assert error(whole, out) < FLOAT32
        for a, w in zip(
            torch.autograd.grad(whole, given, draw, retain_graph=True), grads, strict=True
        ):
            assert error(a, w) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_other_documents_hold_changes_nothing(small, dtype):
    torch.manual_seed(0)
    table = [Segment(0, 0, 20, 5), Segment(0, 20, 18, 0), Segment(0, 38, 12, 3)]
    segments = Segments(50, 1, table)
    given = inputs(segments, 1, 4, 20, 30, dtype)
    draw = torch.randn(50, 1, 1, 20).to(dtype)

    def results(given):
        leaves = [z.detach().requires_grad_() for z in given]
        out, _ = chunked_attention(*leaves[:3], 30, segments, AttentionState(*leaves[3:]))
        return out, *torch.autograd.grad(out, leaves, draw)

    wanted, others = results(given), [*range(20), *range(38, 50)]
    for value in (torch.nan, torch.inf, -7.0):
        changed = [z.clone() for z in given]
        for z in changed[:3]:
            z[20:38] = value
        for a, w in zip(results(changed), wanted, strict=True):
            at = others if len(a) == 50 else slice(None)
            assert torch.equal(a[at], w[at])
    # What a document goes on with is its own, too.
    for z in given[3:]:
        z[:5] = torch.nan
    for a, w in zip(results(given)[:4], wanted, strict=False):
        assert torch.equal(a[20:], w[20:])


@pytest.mark.parametrize("strides", ["sliced", "expanded", "columns apart", "rows first"])
def test_any_strides(small, strides):
    torch.manual_seed(0)
    segments = Segments(40, 2, [Segment(0, 0, 25, 7), Segment(0, 25, 15, 0), Segment(1, 0, 40, 0)])
    q, k, v, *state = inputs(segments, 2, 6, 20, 24)
    if strides == "sliced":
        q, k, v = (torch.cat([z, z, z], -1)[..., 3 : 3 + z.shape[-1]] for z in (q, k, v))
    elif strides == "expanded":
        q, k, v = (z[:, :1].expand(-1, 2, -1, -1) for z in (q, k, v))
    elif strides == "rows first":
        q, k, v = (z.transpose(0, 1).contiguous().transpose(0, 1) for z in (q, k, v))
    else:
        q, k, v, *state = (z.mT.contiguous().mT for z in (q, k, v, *state))
    draws = torch.randn(2, 2, 40, 20).permute(2, 0, 1, 3)[:, :, :1].expand(-1, -1, 2, -1)
    results = []
    for given in ((q, k, v, *state), [z.contiguous() for z in (q, k, v, *state)]):
        leaves = [z.detach().requires_grad_() for z in given]
        out, _ = chunked_attention(*leaves[:3], 24, segments, AttentionState(*leaves[3:]))
        results.append([out, *torch.autograd.grad(out, leaves, draws)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if small == "triton" else error(a, b) < FLOAT32


def test_state_owns_its_memory():
    for segments in (rows(19, 2), rows(3, 2), rows(3, 2, 2), rows(19, 2, 10), random_segments(1)):
        given = inputs(segments, 1, 4, 6, 8)
        _, new = chunked_attention(
            *given[:3], 8, segments, AttentionState(*given[3:]), return_state=True
        )
        for z in new:
            assert z.is_contiguous()
            assert z.untyped_storage().nbytes() == z.numel() * z.element_size()
            z.zero_()
        assert all(z.all() for z in given)


def test_state_is_returned_only_when_asked_for():
    q, k, v, *_ = inputs(rows(3, 1), 1, 4, 6, 8)
    assert chunked_attention(q, k, v, 8)[1] is None


def weights_by_dropout(p, seed):
    """Softmax weights after dropout [rows, queries, keys], by values that are the unit matrix."""
    torch.manual_seed(0)
    length = 90
    q, k = torch.randn(2, length, 2, 1, 4).unbind(0)
    v = torch.eye(length)[:, None, None].expand(length, 2, 1, length)
    torch.manual_seed(seed)
    return chunked_attention(q, k, v, length, dropout_p=p)[0][:, :, 0].transpose(0, 1)


def test_dropout_keeps_its_share_and_rescales(small):
    p = 0.3
    full, dropped = weights_by_dropout(0.0, 1), weights_by_dropout(p, 1)
    causal = torch.ones(90, 90, dtype=torch.bool).tril().expand(2, 90, 90)
    kept = dropped != 0
    assert not kept[~causal].any()
    torch.testing.assert_close(dropped[kept], full[kept] / (1 - p), rtol=1e-6, atol=0)
    share = kept[causal].double().mean()
    five_deviations = 5 * (p * (1 - p) / causal.sum()) ** 0.5
    assert abs(share - (1 - p)) < five_deviations
    # Rows have masks of their own, which the generator's state decides.
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(dropped, weights_by_dropout(p, 1))
    assert not torch.equal(kept, weights_by_dropout(p, 2) != 0)


def test_dropout_under_activation_recompute(small):
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        q, k, v, *_ = inputs(rows(30, 2), 1, 4, 6, 8)
        q.requires_grad_()
        arguments = (q, k, v, 8, None, None, 0.5)
        if recompute:
            out, _ = torch.utils.checkpoint.checkpoint(
                chunked_attention, *arguments, use_reentrant=False
            )
        else:
            out, _ = chunked_attention(*arguments)
        grads.append(torch.autograd.grad(out.square().sum(), q)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_twice_gives_the_same(small, p):
    segments, results = Segments(70, 1, [Segment(0, 0, 50, 3), Segment(0, 50, 20, 0)]), []
    torch.manual_seed(0)
    given = inputs(segments, 2, 4, 36, 40)
    with poisoned():
        for _ in range(2):
            torch.manual_seed(1)
            results.append(run(chunked_attention, given, 40, segments, dropout_p=p))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def state_of(count, dk=4, dv=6):
    return AttentionState(torch.zeros(count, 1, dk), torch.zeros(count, 1, dv))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(5, 2, 4)}, "q has"),
        ({"k": torch.zeros(5, 2, 1, 3)}, "k has"),
        ({"v": torch.zeros(4, 2, 1, 6)}, "v has"),
        ({"v": torch.zeros(5, 2, 1, 6, dtype=torch.float64)}, "v is"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"segments": rows(4, 2)}, "segments are of 4"),
        ({"segments": rows(5, 2, 3)}, "a state of 6"),
        ({"segments": rows(5, 2, 3), "state": state_of(5)}, "state.key"),
        ({"segments": rows(5, 2, 3), "state": state_of(6, dv=5)}, "state.value"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "q": torch.zeros(5, 2, 1, 4),
        "k": torch.zeros(5, 2, 1, 4),
        "v": torch.zeros(5, 2, 1, 6),
        "chunk_size": 8,
    }
    with pytest.raises(ValueError, match=named):
        chunked_attention(**(arguments | change))
