"""Weights that Megatron writes into a model that generates are what it goes on with."""

import torch
from megatron.core.transformer.module import MegatronModule

from building import build, randomize


@torch.no_grad()
def test_what_was_computed_from_the_old_weights_is_forgotten(megatron):
    model, _ = build(dict(chunk_size=16))
    randomize(model)
    layer = model.eval().decoder.layers[0]
    x, y = torch.randn(2, 1, 1, 32)
    _, state = layer.stream(x, None)
    before, _ = layer.stream(y, state)
    # Torch does not count what is written through `.data`.
    layer.mixer.cema.omega.data.mul_(3)
    stale, _ = layer.stream(y, state)
    for module in model.modules():
        if isinstance(module, MegatronModule):
            getattr(module, "refresh_cache", lambda: None)()
    after, _ = layer.stream(y, state)
    assert torch.equal(stale, before)
    assert not torch.allclose(after, before)
