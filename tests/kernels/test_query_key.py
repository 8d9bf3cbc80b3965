"""query_key against its float64 oracle, portable and in Triton's interpreter."""

import pytest
import torch
from megalodon_mcore.kernels.query_key import query_key, query_key_naive
from megalodon_mcore.kernels.segments import Segment, Segments

from comparing import BFLOAT16, error, poisoned, random_segments, seeded

# What the `path` fixture cuts small.
PACKAGE, TILES = "query_key", {"TILE": 256, "PROGRAMS": 4}
EPS = 1e-5
FLOAT32 = 1e-6
rows = Segments.of_rows


def inputs(segments, heads, width, dtype=torch.float32):
    """z, weight and bias."""
    z = torch.randn(segments.length, segments.batch, heads, width) * 2 + 0.5
    return [z.to(dtype), torch.randn(2, heads * width) / 2, torch.randn(2, heads * width)]


def run(function, leaves, chunk_size, segments, dtype=None, base=1e4):
    """q and k, then gradients of z, weight and bias."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    results = function(*leaves, EPS, base, chunk_size, segments)
    generator = seeded(0)
    # Exact in every type, so that all see the same gradients.
    draws = [
        torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype)
        for result in results
    ]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, draws)]


def compare(segments, heads, width, chunk_size, dtype=torch.float32):
    torch.manual_seed(0)
    leaves = inputs(segments, heads, width, dtype)
    with poisoned():
        actual = run(query_key, leaves, chunk_size, segments)
    wanted = run(query_key_naive, leaves, chunk_size, segments, torch.float64)
    for leaf, a, w in zip([leaves[0]] * 2 + leaves, actual, wanted, strict=True):
        assert a.dtype == leaf.dtype
        if dtype == a.dtype == torch.bfloat16:
            torch.testing.assert_close(a.double(), w, rtol=BFLOAT16, atol=1e-5)
        else:
            assert error(a, w) < (2**-11 if a.dtype == torch.float16 else FLOAT32)
    assert actual[0].is_contiguous() and actual[1].is_contiguous()


@pytest.mark.parametrize(
    ("segments", "heads", "width", "chunk_size"),
    [
        (rows(7, 2), 1, 2, 16),
        (rows(19, 1), 3, 6, 8),
        (rows(19, 2, 13), 2, 10, 8),
        (rows(1, 2, 100_003), 2, 4, 4096),
        (rows(37, 1, 5), 2, 64, 100),
        (rows(70, 1, 9), 2, 16, 20),
        (Segments(19, 2, [Segment(0, 0, 19, 13), Segment(1, 0, 19, 2)]), 2, 10, 8),
        (Segments.of_documents([[*range(12), 70]]), 2, 16, 20),
    ],
)
def test_matches_the_oracle(path, segments, heads, width, chunk_size):
    compare(segments, heads, width, chunk_size)


@pytest.mark.parametrize("seed", range(6))
def test_random_tables(path, seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    length = 40 if path == "triton" else 90
    compare(random_segments(seed, length), 1 + seed % 2, 10, (20, 7)[seed % 2], dtype)


def test_any_strides(path):
    torch.manual_seed(0)
    segments = Segments(5, 2, [Segment(0, 0, 5, 3), Segment(1, 0, 2, 0), Segment(1, 2, 3, 0)])
    parameters = inputs(segments, 3, 6)[1:]
    for z in (
        torch.randn(5, 2, 3, 9)[..., 1:7],
        torch.randn(2, 3, 6, 5).permute(3, 0, 1, 2),
        torch.randn(5, 1, 3, 6).expand(5, 2, 3, 6),
    ):
        leaves = [leaf.detach().requires_grad_() for leaf in (z, *parameters)]
        results = []
        for function in (query_key, query_key_naive):
            q, k = function(*leaves, EPS, 1e4, 8, segments)
            # Gradients with strides of zero, and with gaps.
            loss = q.sum() + k[..., ::2].sum()
            results.append([q, k, *torch.autograd.grad(loss, leaves)])
        for a, w in zip(*results, strict=True):
            torch.testing.assert_close(a.double(), w.double(), rtol=1e-5, atol=2e-6)


def test_segments_are_parts_of_the_whole(path):
    """A document in one row, and its parts in another order with another in between."""
    torch.manual_seed(0)
    leaves = inputs(rows(21, 1), 2, 8)
    whole = query_key(*leaves, EPS, 1e4, 8)
    z = leaves[0]
    packed = torch.cat([z[7:], torch.randn(9, 1, 2, 8), z[:6], z[6:7]])
    table = [(14, 7), (9, 0), (6, 0), (1, 6)]
    starts = (0, 14, 23, 29)
    segments = Segments(30, 1, [Segment(0, s, *z) for s, z in zip(starts, table, strict=True)])
    parts = query_key(packed, *leaves[1:], EPS, 1e4, 8, segments)
    for a, w in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat([a[23:29], a[29:], a[:14]]), w, rtol=0, atol=1e-6)


def test_what_other_documents_hold_changes_nothing(path):
    torch.manual_seed(0)
    segments = Segments.of_documents([[0, 9, 10, 30]])
    leaves = inputs(segments, 2, 8)
    wanted = run(query_key, leaves, 8, segments)[:3]
    for value in (torch.nan, torch.inf, 3.0):
        z = leaves[0].clone()
        z[9:10] = value
        for a, w in zip(run(query_key, [z, *leaves[1:]], 8, segments)[:3], wanted, strict=True):
            assert torch.equal(a[:9], w[:9]) and torch.equal(a[10:], w[10:])


def test_twice_gives_the_same(path):
    torch.manual_seed(0)
    segments = rows(30, 2, 5)
    leaves = inputs(segments, 3, 12)
    first, again = (run(query_key, leaves, 16, segments) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_keeps_z_alone(path):
    leaves = [leaf.requires_grad_() for leaf in inputs(rows(40, 2), 2, 8, torch.bfloat16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        query_key(*leaves, EPS, 1e4, 16)
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in addresses]
    # Tables of turns, which all layers share: of a tile's positions and of its start.
    assert [tuple(t.shape[:2]) for t in own] == ([] if path == "torch" else [(16, 4), (1, 4)])


def test_gradcheck():
    leaves = [leaf.double().requires_grad_() for leaf in inputs(rows(5, 1), 2, 4)]
    segments = Segments(5, 1, [Segment(0, 0, 4, 2), Segment(0, 4, 1, 1)])
    assert torch.autograd.gradcheck(lambda *z: query_key(*z, EPS, 1e4, 3, segments), leaves)


def test_nothing_to_project():
    leaves = [leaf.requires_grad_() for leaf in inputs(rows(0, 2), 3, 4)]
    q, k = query_key(*leaves, EPS, 1e4, 8)
    assert q.shape == k.shape == (0, 2, 3, 4)
    torch.autograd.grad(q.sum() + k.sum(), leaves)


def test_training_after_inference_with_the_same_table():
    leaves = inputs(rows(2, 1, 77), 1, 4)
    arguments = EPS, 12345.0, 8, rows(2, 1, 77)
    with torch.inference_mode():
        query_key(*leaves, *arguments)
    query, _ = query_key(*(leaf.requires_grad_() for leaf in leaves), *arguments)
    query.sum().backward()


def test_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    leaves = [leaf.double() for leaf in inputs(rows(1, 1), 1, 8)]
    logits = []
    for position in (0, 17, 58):
        query, _ = query_key(*leaves, EPS, 1e4, 64, rows(1, 1, position + 5))
        _, key = query_key(*leaves, EPS, 1e4, 64, rows(1, 1, position))
        logits.append((query * key).sum())
    torch.testing.assert_close(logits[1:], logits[:1] * 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"z": torch.zeros(1, 2, 1, 3)}, "z is"),
        ({"z": torch.zeros(1, 2, 4)}, "z is"),
        ({"z": torch.zeros(1, 2, 1, 4, dtype=torch.int64)}, "z is"),
        ({"weight": torch.zeros(2, 3)}, "weight has shape"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"base": 0.0}, "base is"),
        ({"segments": rows(3, 1)}, "segments are of 3"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"z": torch.zeros(2, 1, 1, 4), "weight": torch.zeros(2, 4)}
    arguments |= {"bias": torch.zeros(2, 4), "eps": EPS, "base": 1e4, "chunk_size": 8}
    with pytest.raises(ValueError, match=named):
        query_key(**(arguments | change))
