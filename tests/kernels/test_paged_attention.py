"""paged_attention against its float64 oracle, portable and in Triton's interpreter."""

import pytest
import torch
from megalodon_mcore.kernels.paged_attention import paged_attention, paged_attention_naive

from comparing import BFLOAT16, error, poisoned

# What the `path` fixture cuts small.
PACKAGE, TILES = "paged_attention", {"SLOTS": 16, "WIDTH": 16}
# Requests, heads, slots, dk, dv, pages.
SHAPES = [(1, 1, 1, 1, 1, 1), (3, 2, 7, 6, 10, 5), (5, 3, 48, 16, 40, 4), (2, 1, 67, 24, 33, 9)]


def inputs(shape, dtype=torch.float32, seed=0):
    """q, keys, values, pages and filled; NaN wherever nobody may look."""
    requests, heads, slots, dk, dv, pages = shape
    torch.manual_seed(seed)
    q = 3 * torch.randn(requests, heads, dk)
    # Between other requests' pages, as a cache of several tensors has them.
    keys, values = (
        torch.full((pages, 3, heads, slots, width), torch.nan)[:, 1] for width in (dk, dv)
    )
    owned, filled = torch.randint(pages, (requests,)), torch.randint(1, slots + 1, (requests,))
    filled[0] = slots
    for page in owned.unique():
        n = filled[owned == page].max()
        keys[page, :, :n], values[page, :, :n] = (
            torch.randn(heads, n, width) for width in (dk, dv)
        )
    return q.to(dtype), keys.to(dtype), values.to(dtype), owned, filled


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_oracle(path, shape, dtype):
    given = inputs(shape, dtype)
    with poisoned():
        actual, again = paged_attention(*given), paged_attention(*given)
    assert actual.dtype == dtype and torch.equal(actual, again)
    wanted = paged_attention_naive(*given)
    bounds = {torch.float32: float32_bound(*given), torch.bfloat16: BFLOAT16}
    assert error(actual, wanted) < bounds.get(dtype, 2**-11)


def float32_bound(q, keys, values, pages, filled):
    """What rounding a score's terms once or twice changes in its weight."""
    terms = [
        (q[r][:, None] * keys[page, :, :n]).abs().sum(-1).max()
        for r, (page, n) in enumerate(zip(pages.tolist(), filled.tolist(), strict=True))
    ]
    return 2 * 2**-24 * float(max(terms))


def test_room_is_what_has_to_be_looked_at(path):
    q, keys, values, pages, filled = inputs((4, 2, 50, 8, 12, 6))
    filled.clamp_(max=20)
    whole = paged_attention(q, keys, values, pages, filled)
    torch.testing.assert_close(whole, paged_attention(q, keys, values, pages, filled, 20))


def test_large_scores(path):
    q, keys, values, pages, filled = inputs((3, 2, 40, 8, 12, 3))
    given = (100 * q, keys, values, pages, filled)
    torch.testing.assert_close(
        paged_attention(*given).double(), paged_attention_naive(*given), rtol=1e-4, atol=1e-4
    )


def test_float64_and_nobody():
    given = inputs((5, 2, 9, 4, 6, 3), torch.float64)
    torch.testing.assert_close(paged_attention(*given), paged_attention_naive(*given))
    q, keys, values, pages, filled = given
    assert paged_attention(q[:0], keys, values, pages[:0], filled[:0]).shape == (0, 2, 6)


def test_errors_name_the_argument():
    q, keys, values, pages, filled = inputs((2, 2, 9, 4, 6, 3))
    for changed, name in (
        ((q[0], keys, values, pages, filled), "q has"),
        ((q, keys[..., :3], values, pages, filled), "keys has"),
        ((q, keys, values[:1], pages, filled), "values has"),
        ((q, keys.double(), values, pages, filled), "keys is torch.float64"),
        ((q, keys, values, pages[:1], filled), "pages is"),
        ((q, keys, values, pages, filled.double()), "filled is torch.float64"),
        ((q, keys, values, pages, filled, 10), "room is 10; it must be 1 to 9"),
    ):
        with pytest.raises(ValueError, match=name):
            paged_attention(*changed)
