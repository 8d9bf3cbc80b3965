"""The one-step functions that decoding takes, step after step, against the float64 oracles."""

import copy
import math

import pytest
import torch
from megalodon_mcore.kernels.cema import cema_step, step_weights
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.chunked_attention import (
    AttentionState,
    attention_step,
    chunked_attention_naive,
)
from megalodon_mcore.kernels.query_key import query_key_naive, query_key_step
from megalodon_mcore.kernels.query_key.turns import turns
from megalodon_mcore.kernels.row_norm import rms_norm_naive, rms_norm_step
from megalodon_mcore.kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm_naive,
    timestep_norm_step,
)

from comparing import error, poisoned

EPS = 1e-5


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_timestep_norm_loses_only_what_a_float32_state_rounds_off(offset):
    torch.manual_seed(0)
    x = torch.randn(2, 2000, 24) + offset
    weight, bias = torch.randn(2, 24)
    mean, var = torch.zeros(2, 2, 4)
    rounded = TimestepNormState(torch.zeros(2, dtype=torch.int64), mean, var)
    actual, of_rounded = [], []
    for t, step in enumerate(x.unbind(1)):
        share = torch.full((2, 1), 1 / (t + 1), dtype=torch.float64)
        y, mean, var = timestep_norm_step(step, weight + 1, bias, EPS, mean, var, share)
        actual.append(y)
        y, state = timestep_norm_naive(step[:, None], weight, bias, 4, EPS, rounded, None, True)
        of_rounded.append(y)
        rounded = TimestepNormState(state.count, state.mean.float(), state.var.float())
    wanted, state = timestep_norm_naive(x, weight, bias, 4, EPS, return_state=True)
    for a, r, w in (
        (mean, rounded.mean, state.mean),
        (var, rounded.var, state.var),
        (torch.stack(actual, 1), torch.cat(of_rounded, 1), wanted),
    ):
        assert error(a, w) < 1.5 * error(r, w) + 1e-6


def test_cema_over_a_long_memory():
    torch.manual_seed(0)
    alpha, delta = torch.randn(2, 6, 5, 1)
    delta[0] = -12.0
    theta, gamma, omega = torch.randn(6, 1, 1), torch.randn(6, 5, 2), torch.randn(6, 1)
    x = torch.randn(2, 4000, 6)
    weights = step_weights(alpha, delta, theta, gamma, omega)
    state, steps = torch.zeros(2, 6, 5, dtype=torch.complex64), []
    for step in x.unbind(1):
        before = state.clone()
        y, after = cema_step(step, weights, state)
        assert torch.equal(before, state)
        state = after
        steps.append(y)
    wanted, wanted_state = cema_naive(x, alpha, delta, theta, gamma, omega)
    assert error(torch.view_as_real(state), torch.view_as_real(wanted_state)) < 3e-6
    assert error(torch.stack(steps, 1), wanted) < 3e-6


def test_rms_norm_and_query_key():
    torch.manual_seed(0)
    heads, width = 3, 10
    z = torch.randn(4, 1, heads, width) * torch.logspace(-6, 6, 4).view(-1, 1, 1, 1)
    weight, bias = torch.randn(2, 2, heads * width)
    normed = rms_norm_step(
        z, (weight[0, :width] + 1) * math.sqrt(width), torch.tensor(math.sqrt(width * EPS))
    )
    assert error(normed, rms_norm_naive(z, weight[0, :width], EPS)) < 1e-6
    wanted = query_key_naive(z, weight, bias, EPS, 1e4, 21, 16)
    actual = query_key_step(
        z[:, 0],
        (weight + 1).view(2, 1, heads, width),
        bias.view(2, 1, heads, width),
        torch.tensor(math.sqrt(width * EPS)),
        turns(16, width, 1e4, z.device, torch.complex64)[5],
    )
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w[:, 0]) < 1e-6


def kv(batch, length, heads, dk=4, dv=6):
    return [torch.randn(batch, length, heads, width) for width in (dk, dk, dv)]


@pytest.mark.parametrize("cached", [0, 3])
def test_attention_across_chunks(cached):
    torch.manual_seed(0)
    with poisoned():
        q, k, v = kv(2, 19, 3)
        state = start = AttentionState(*kv(2, cached, 3)[1:])
        steps = []
        for t in range(19):
            out, state = attention_step(q[:, t], k[:, t], v[:, t], 7, state)
            _, wanted_state = chunked_attention_naive(
                *(z[:, : t + 1] for z in (q, k, v)), 7, start, return_state=True
            )
            for a, w in zip(state, wanted_state, strict=True):
                assert torch.equal(a.double(), w)
            steps.append(out)
        wanted, _ = chunked_attention_naive(q, k, v, 7, start)
        assert error(torch.stack(steps, 1), wanted) < 3e-6


def test_attention_leaves_every_state_as_it_was():
    """Three sequences go on from every state of one, and each state's copy goes on like it."""
    torch.manual_seed(0)
    states, copies = [AttentionState(*kv(1, 2, 2)[1:])], []
    for _ in range(3):
        new = []
        for state in states:
            for _ in range(3):
                q, k, v = (z[:, 0] for z in kv(1, 1, 2))
                out, after = attention_step(q, k, v, 16, state)
                again, other = attention_step(q, k, v, 16, copy.deepcopy(state))
                assert torch.equal(out, again)
                new.append(after)
                copies.append((after, other))
        states = new
    for state, other in copies:
        for a, b in zip(state, other, strict=True):
            assert torch.equal(a, b)


def test_a_sequence_alone_keeps_its_memory():
    state = AttentionState(*kv(1, 1, 2)[1:])
    addresses = set()
    for _ in range(14):
        _, state = attention_step(*(z[:, 0] for z in kv(1, 1, 2)), 16, state)
        addresses.add(state.value.data_ptr())
    assert len(addresses) == 1
    _, state = attention_step(*(z[:, 0] for z in kv(1, 1, 2)), 16, state)
    assert state.key.untyped_storage().nbytes() == state.value.untyped_storage().nbytes() == 0
    assert state.key.shape == (1, 0, 2, 4) and state.value.shape == (1, 0, 2, 6)
