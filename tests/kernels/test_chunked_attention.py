"""chunked_attention against its float64 oracle, its state, its dropout."""

import pytest
import torch
from megalodon_mcore.kernels.chunked_attention import (
    AttentionState,
    chunked_attention,
    chunked_attention_naive,
    portable,
)

from comparing import error, poisoned

FLOAT32 = 3e-6


def random_inputs(batch, length, heads, dk, dv, cached=None, dtype=torch.float32):
    def draw(positions, width):
        return torch.randn(positions, batch, heads, width).transpose(0, 1).to(dtype)

    q, k, v = draw(length, dk), draw(length, dk), draw(length, dv)
    state = None if cached is None else AttentionState(draw(cached, dk), draw(cached, dv))
    return q, k, v, state


def run(function, q, k, v, chunk_size, state, draws, dtype=None, **keywords):
    """Outputs, then gradients of q, k, v and the state, of a loss weighed by `draws`."""
    leaves = [z.detach().to(dtype or z.dtype).requires_grad_() for z in (q, k, v, *(state or ()))]
    state = AttentionState(*leaves[3:]) if state else None
    out, new = function(*leaves[:3], chunk_size, state, return_state=True, **keywords)
    values = [out, *new]
    loss = sum((z.double() * d.double()).sum() for z, d in zip(values, draws, strict=True))
    return [*values, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def draws_for(q, v, chunk_size, cached):
    left = ((cached or 0) + q.shape[1]) % chunk_size
    shapes = (v.shape, (*q[:, :0].shape[:1], left, *q.shape[2:]), (v.shape[0], left, *v.shape[2:]))
    return [torch.randn(shape).to(q.dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dk", "dv", "chunk_size", "cached"),
    [
        (1, 1, 1, 2, 3, 4, None),
        (1, 16, 1, 4, 32, 8, None),
        (2, 19, 3, 5, 7, 6, None),
        (2, 19, 3, 5, 7, 6, 0),
        (2, 19, 2, 5, 7, 6, 4),
        (1, 3, 2, 4, 9, 8, 2),
        (3, 3, 2, 4, 4, 8, 5),
        (2, 11, 1, 4, 9, 8, 5),
        (2, 9, 2, 3, 5, 1, None),
        (2, 7, 2, 3, 5, 100, None),
        (2, 0, 2, 3, 5, 4, None),
        (2, 0, 2, 3, 5, 4, 3),
    ],
)
@pytest.mark.parametrize("query_block", [256, 3])
def test_matches_the_oracle(
    batch, length, heads, dk, dv, chunk_size, cached, query_block, monkeypatch
):
    monkeypatch.setattr(portable, "QUERY_BLOCK", query_block)
    torch.manual_seed(length)
    q, k, v, state = random_inputs(batch, length, heads, dk, dv, cached)
    draws = draws_for(q, v, chunk_size, cached)
    actual = run(chunked_attention, q, k, v, chunk_size, state, draws)
    wanted = run(chunked_attention_naive, q, k, v, chunk_size, state, draws, torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == torch.float32
        assert error(a, w) < FLOAT32


def test_large_chunk():
    torch.manual_seed(0)
    q, k, v, state = random_inputs(1, 1100, 1, 16, 48, 30)
    draws = draws_for(q, v, 520, 30)
    actual = run(chunked_attention, q, k, v, 520, state, draws)
    wanted = run(chunked_attention_naive, q, k, v, 520, state, draws, torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w) < FLOAT32


def test_gradcheck():
    torch.manual_seed(0)
    q, k, v, state = random_inputs(1, 5, 2, 2, 2, cached=2, dtype=torch.float64)

    def function(q, k, v, *state):
        out, new = chunked_attention(q, k, v, 3, AttentionState(*state), return_state=True)
        return out, *new

    assert torch.autograd.gradcheck(function, [z.requires_grad_() for z in (q, k, v, *state)])


def test_gradcheck_with_dropout():
    torch.manual_seed(0)
    q, k, v, state = random_inputs(1, 5, 2, 2, 2, cached=2, dtype=torch.float64)

    def function(q, k, v, *state):
        torch.manual_seed(7)
        return chunked_attention(q, k, v, 3, AttentionState(*state), dropout_p=0.4)[0]

    assert torch.autograd.gradcheck(function, [z.requires_grad_() for z in (q, k, v, *state)])


def test_bfloat16():
    torch.manual_seed(0)
    q, k, v, state = random_inputs(2, 70, 2, 8, 64, 5, torch.bfloat16)
    draws = draws_for(q, v, 32, 5)
    actual = run(chunked_attention, q, k, v, 32, state, draws)
    wanted = run(chunked_attention_naive, q, k, v, 32, state, draws, torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, w) < 2**-7


@pytest.mark.parametrize("cuts", [(0, 1, 2, 9, 9, 14, 23), (0, 8, 16, 23), (0, 5, 21, 23)])
def test_pieces_equal_the_whole(cuts):
    torch.manual_seed(0)
    q, k, v, _ = random_inputs(2, 23, 2, 4, 6)
    draws = draws_for(q, v, 8, None)

    def piecewise(q, k, v, chunk_size, state, return_state):
        outputs = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            piece = (z[:, start:stop] for z in (q, k, v))
            out, state = chunked_attention(*piece, chunk_size, state, return_state=True)
            assert state.key.shape[1] == state.value.shape[1] == stop % chunk_size
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    whole = run(chunked_attention, q, k, v, 8, None, draws)
    for a, w in zip(run(piecewise, q, k, v, 8, None, draws), whole, strict=True):
        assert error(a, w) < FLOAT32


@pytest.mark.parametrize(("length", "cached"), [(19, None), (3, None), (3, 2), (19, 2), (0, 2)])
def test_state_owns_its_memory(length, cached):
    q, k, v, state = random_inputs(2, length, 1, 4, 6, cached)
    _, new = chunked_attention(q, k, v, 8, state, return_state=True)
    for z in new:
        assert z.is_contiguous()
        assert z.untyped_storage().nbytes() == z.numel() * z.element_size()
        z.zero_()
    for z in (k, v, *(state or ())):
        assert z.numel() == 0 or z.all()


def test_state_is_returned_only_when_asked_for():
    q, k, v, _ = random_inputs(1, 3, 1, 4, 6)
    assert chunked_attention(q, k, v, 8)[1] is None


def weights_by_dropout(p, seed):
    """Softmax weights after dropout, made visible by values that are the unit matrix."""
    torch.manual_seed(0)
    length = 300
    q, k = torch.randn(2, 2, length, 1, 4).unbind(0)
    v = torch.eye(length)[None, :, None].expand(2, length, 1, length)
    torch.manual_seed(seed)
    return chunked_attention(q, k, v, length, dropout_p=p)[0][:, :, 0]


def test_dropout_keeps_its_share_and_rescales():
    p = 0.3
    full, dropped = weights_by_dropout(0.0, 1), weights_by_dropout(p, 1)
    causal = torch.ones(300, 300, dtype=torch.bool).tril().expand(2, 300, 300)
    kept = dropped != 0
    assert not kept[~causal].any()
    torch.testing.assert_close(dropped[kept], full[kept] / (1 - p), rtol=1e-6, atol=0)
    share = kept[causal].double().mean()
    five_deviations = 5 * (p * (1 - p) / causal.sum()) ** 0.5
    assert abs(share - (1 - p)) < five_deviations


def test_dropout_follows_the_generator():
    assert torch.equal(weights_by_dropout(0.3, 1), weights_by_dropout(0.3, 1))
    assert not torch.equal(weights_by_dropout(0.3, 1), weights_by_dropout(0.3, 2))


def test_dropout_under_activation_recompute():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        q, k, v, _ = random_inputs(2, 30, 1, 4, 6)
        q.requires_grad_()
        arguments = (q, k, v, 8, None, 0.5)
        if recompute:
            out, _ = torch.utils.checkpoint.checkpoint(
                chunked_attention, *arguments, use_reentrant=False
            )
        else:
            out, _ = chunked_attention(*arguments)
        grads.append(torch.autograd.grad(out.square().sum(), q)[0])
    assert torch.equal(*grads)


def test_no_uninitialised_memory_is_read():
    torch.manual_seed(0)
    q, k, v, state = random_inputs(2, 30, 2, 4, 6, 3)
    draws = draws_for(q, v, 8, 3)
    with poisoned():
        assert torch.empty(1).isnan()
        for p in (0.0, 0.2):
            results = run(chunked_attention, q, k, v, 8, state, draws, dropout_p=p)
            assert all(z.isfinite().all() for z in results)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q is"),
        ({"k": torch.zeros(2, 5, 1, 3)}, "k has"),
        ({"v": torch.zeros(2, 4, 1, 6)}, "v has"),
        ({"v": torch.zeros(2, 5, 1, 6, dtype=torch.float64)}, "v is"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"state": AttentionState(torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 6))}, "state.key"),
        ({"state": AttentionState(torch.zeros(2, 3, 1, 4), torch.zeros(2, 2, 1, 6))}, "state.val"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "q": torch.zeros(2, 5, 1, 4),
        "k": torch.zeros(2, 5, 1, 4),
        "v": torch.zeros(2, 5, 1, 6),
        "chunk_size": 8,
    }
    with pytest.raises(ValueError, match=named):
        chunked_attention(**(arguments | change))
