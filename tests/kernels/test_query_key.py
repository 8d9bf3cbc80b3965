"""query_key against its float64 oracle, portable and in Triton's interpreter."""

import pytest
import torch
from megalodon_mcore.kernels.query_key import query_key, query_key_naive

from comparing import BFLOAT16, error, poisoned, seeded

# What the `path` fixture cuts small.
PACKAGE, TILES = "query_key", {"TILE": 256, "PROGRAMS": 4}
EPS = 1e-5
FLOAT32 = 1e-6
CASES = [
    # batch, length, heads, width, offset, chunk_size
    (2, 7, 1, 2, 0, 16),
    (1, 19, 3, 6, 0, 8),
    (2, 19, 2, 10, 13, 8),
    (2, 1, 2, 4, 100_003, 4096),
    (1, 37, 2, 64, 5, 100),
    (1, 70, 2, 16, 9, 20),
]


def inputs(batch, length, heads, width, dtype=torch.float32):
    """z as layers have it, [length, batch, heads * width] in memory; weight and bias."""
    z = torch.randn(length, batch, heads, width).transpose(0, 1) * 2 + 0.5
    return [z.to(dtype), torch.randn(2, heads * width) / 2, torch.randn(2, heads * width)]


def run(function, leaves, offset, chunk_size, dtype=None, base=1e4):
    """q and k, then gradients of z, weight and bias."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    results = function(*leaves, EPS, base, offset, chunk_size)
    generator = seeded(0)
    # Exact in every type, so that all see the same gradients.
    draws = [
        torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype)
        for result in results
    ]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, draws)]


@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(path, case):
    torch.manual_seed(0)
    leaves = inputs(*case[:4])
    actual = run(query_key, leaves, *case[4:])
    wanted = run(query_key_naive, leaves, *case[4:], dtype=torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == torch.float32 and error(a, w) < FLOAT32
    assert actual[0].is_contiguous() and actual[1].is_contiguous()


def test_bfloat16(path):
    torch.manual_seed(0)
    leaves = inputs(2, 19, 2, 10, torch.bfloat16)
    query, key, grad_z, *parameters = run(query_key, leaves, 13, 8)
    *wanted, grad_weight, grad_bias = run(query_key_naive, leaves, 13, 8, torch.float64)
    for a, w in zip((query, key, grad_z), wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), w, rtol=BFLOAT16, atol=1e-5)
    for a, w in zip(parameters, (grad_weight, grad_bias), strict=True):
        assert a.dtype == torch.float32 and error(a, w) < FLOAT32


def test_any_strides(path):
    torch.manual_seed(0)
    parameters = inputs(2, 5, 3, 6)[1:]
    for z in (torch.randn(2, 5, 3, 9)[..., 1:7], torch.randn(2, 3, 6, 5).permute(0, 3, 1, 2)):
        leaves = [leaf.detach().requires_grad_() for leaf in (z, *parameters)]
        results = []
        for function in (query_key, query_key_naive):
            q, k = function(*leaves, EPS, 1e4, 0, 8)
            # Gradients with strides of zero, and with gaps.
            loss = q.sum() + k[..., ::2].sum()
            results.append([q, k, *torch.autograd.grad(loss, leaves)])
        for a, w in zip(*results, strict=True):
            torch.testing.assert_close(a.double(), w.double(), rtol=1e-5, atol=2e-6)


def test_segments_are_parts_of_the_whole(path):
    """As context parallelism cuts a sequence, with an offset for every segment."""
    torch.manual_seed(0)
    leaves = inputs(2, 21, 2, 8)
    whole = query_key(*leaves, EPS, 1e4, 3, 8)
    for start, stop in ((0, 6), (6, 7), (7, 21)):
        part = query_key(leaves[0][:, start:stop], *leaves[1:], EPS, 1e4, 3 + start, 8)
        for a, w in zip(part, whole, strict=True):
            torch.testing.assert_close(a, w[:, start:stop], rtol=0, atol=1e-6)


def test_no_uninitialised_memory_is_read_and_twice_gives_the_same(path):
    torch.manual_seed(0)
    leaves = inputs(2, 30, 3, 12)
    with poisoned():
        first, again = run(query_key, leaves, 5, 16), run(query_key, leaves, 5, 16)
        for a, b in zip(first, again, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


def test_keeps_z_alone(path):
    leaves = [leaf.requires_grad_() for leaf in inputs(2, 40, 2, 8, torch.bfloat16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        query_key(*leaves, EPS, 1e4, 0, 16)
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in addresses]
    # Tables of turns, which all layers share: of a tile's positions and of its start.
    assert [tuple(t.shape[:2]) for t in own] == ([] if path == "torch" else [(16, 4), (1, 4)])


def test_gradcheck():
    leaves = [leaf.double().requires_grad_() for leaf in inputs(1, 5, 2, 4)]
    assert torch.autograd.gradcheck(lambda *given: query_key(*given, EPS, 1e4, 2, 3), leaves)


def test_nothing_to_project():
    leaves = [leaf.requires_grad_() for leaf in inputs(2, 0, 3, 4)]
    q, k = query_key(*leaves, EPS, 1e4, 0, 8)
    assert q.shape == k.shape == (2, 0, 3, 4)
    torch.autograd.grad(q.sum() + k.sum(), leaves)


def test_training_after_inference_with_the_same_table():
    leaves = inputs(1, 2, 1, 4)
    with torch.inference_mode():
        query_key(*leaves, EPS, 12345.0, 0, 8)
    query, _ = query_key(*(leaf.requires_grad_() for leaf in leaves), EPS, 12345.0, 0, 8)
    query.sum().backward()


def test_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    leaves = [leaf.double() for leaf in inputs(1, 1, 1, 8)]
    logits = []
    for position in (0, 17, 58):
        query, _ = query_key(*leaves, EPS, 1e4, position + 5, 64)
        _, key = query_key(*leaves, EPS, 1e4, position, 64)
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
        ({"offset": -1}, "offset is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"z": torch.zeros(1, 2, 1, 4), "weight": torch.zeros(2, 4)}
    arguments |= {"bias": torch.zeros(2, 4), "eps": EPS, "base": 1e4, "offset": 0, "chunk_size": 8}
    with pytest.raises(ValueError, match=named):
        query_key(**(arguments | change))
