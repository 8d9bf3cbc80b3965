"""With megalodon_mcore's operators and with its own the model has one value, state, gradient."""

import pytest
import torch
from hf_models import SHAPES, build

from comparing import error
from megalodon_mcore.hf import block_megalodon

ROWS = ("mean", "var", "cema", "keys", "values")


@pytest.fixture
def both_ways(monkeypatch):
    """Calls a function with the operators and without; counts what was called of them."""

    def run(function):
        calls = []
        for name, operator in (
            ("timestep_norm", "timestep_norm"),
            ("cema", "cema"),
            ("query_key", "query_key"),
            ("chunked_attention", "chunked_attention"),
        ):
            module = getattr(block_megalodon.kernels, name)
            whole = getattr(module, operator)

            def counted(*args, whole=whole, name=name, **options):
                calls.append(name)
                return whole(*args, **options)

            monkeypatch.setattr(module, operator, counted)
        ours = function()
        count = len(calls)
        monkeypatch.setattr(block_megalodon, "kernels", None)
        own = function()
        assert count and len(calls) == count
        return ours, own, calls

    return run


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [2, 75])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_of_training(both_ways, name, length, padded):
    model = build(name).double().train()
    tokens = torch.randint(64, (2, length))
    mask = torch.ones_like(tokens)
    mask[0, : length // 3 * padded] = 0

    def step():
        logits = model(tokens, attention_mask=mask).logits
        return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    ours, own, calls = both_ways(step)
    assert {"timestep_norm", "cema", "query_key", "chunked_attention"} == set(calls)
    for a, b in zip(ours, own, strict=True):
        assert error(a, b) < 1e-9


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [[5, 40, 1, 44], [13, 8, 27, 2, 40]])
def test_values_and_states_of_pieces(both_ways, name, cuts):
    model = build(name, piece_length=16)
    tokens = torch.randint(64, (2, 90))

    @torch.no_grad()
    def read():
        cache, found = None, []
        for piece in tokens.split(cuts, dim=1):
            output = model(piece, past_key_values=cache)
            cache = output.past_key_values
            fill = int(cache.seen[0]) % model.config.chunk_size
            for state in cache.states:
                for key in ROWS:
                    if key in state:
                        seen = state[key][:, :, :fill] if key in ("keys", "values") else state[key]
                        found.append(seen.clone())
            found.append(output.logits)
        return found

    ours, own, _ = both_ways(read)
    for a, b in zip(ours, own, strict=True):
        assert not a.numel() or error(a, b.double()) < 2e-5
