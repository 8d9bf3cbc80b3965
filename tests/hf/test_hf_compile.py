"""torch.export with any length and torch.compile without graph breaks give what eager does."""

import pytest
import torch
from hf_models import build, relative

LENGTHS = (75, 3, 150)


def test_an_exported_model_takes_any_length():
    model = build()
    any_length = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    tokens = torch.randint(64, (2, 40))
    program = torch.export.export(
        model, (tokens,), dict(use_cache=False), dynamic_shapes=any_length
    ).module()
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(64, (2, length))
            expected = model(tokens, use_cache=False).logits.double()
            assert relative(program(tokens, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_compiled_model_has_one_graph(use_cache):
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(64, (2, length + 1))
            expected = model(tokens, use_cache=False).logits.double()
            actual = compiled(tokens[:, :-1], use_cache=use_cache)
            assert relative(actual.logits, expected[:, :-1]) < 1e-5
            if use_cache:
                after = model(tokens[:, -1:], past_key_values=actual.past_key_values)
                assert relative(after.logits, expected[:, -1:]) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_takes_padding_without_a_cache():
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (75, 20):
            tokens, mask = torch.randint(64, (2, length)), torch.ones(2, length, dtype=torch.int64)
            mask[0, : length // 3] = 0
            expected = model(tokens, attention_mask=mask, use_cache=False).logits.double()
            actual = compiled(tokens, attention_mask=mask, use_cache=False).logits
            assert relative(actual, expected) < 1e-5


def test_a_compiled_model_trains():
    torch._dynamo.reset()
    model = build().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(64, (2, 75))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, parameters)
    actual = torch.autograd.grad(compiled(tokens, labels=tokens).loss, parameters)
    for a, b in zip(actual, expected, strict=True):
        assert relative(a, b.double()) < 1e-4
