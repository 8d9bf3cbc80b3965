"""torch.export with any length and torch.compile without graph breaks give what eager does."""

import pytest
import torch
from hf_models import build
from mixed_models import build_mixed

from comparing import error
from megalodon_mcore.hf import MegalodonCache

LENGTHS = (75, 3, 150)
SMALL = dict(num_hidden_layers=1)
"""Tracing takes as long for every layer."""
MODELS = {"blocks": lambda: build(**SMALL), "mixed": build_mixed}


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_takes_any_length(kind):
    model = MODELS[kind]()
    any_length = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    tokens = torch.randint(64, (2, 40))
    program = torch.export.export(
        model, (tokens,), dict(use_cache=False), dynamic_shapes=any_length
    ).module()
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(64, (2, length))
            expected = model(tokens, use_cache=False).logits.double()
            assert error(program(tokens, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_model_has_one_graph(kind, use_cache):
    """Traced a second time, for aot_eager, where a cache is written to, or gradients are wanted."""
    torch._dynamo.reset()
    model = MODELS[kind]()
    backend = "aot_eager" if use_cache else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(64, (2, length + 1))
            expected = model(tokens, use_cache=False).logits.double()
            actual = compiled(tokens[:, :-1], use_cache=use_cache)
            assert error(actual.logits, expected[:, :-1]) < 1e-5
            if use_cache:
                after = model(tokens[:, -1:], past_key_values=actual.past_key_values)
                assert error(after.logits, expected[:, -1:]) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_takes_padding_without_a_cache():
    torch._dynamo.reset()
    model = build(**SMALL)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (75, 20):
            tokens, mask = torch.randint(64, (2, length)), torch.ones(2, length, dtype=torch.int64)
            mask[0, : length // 3] = 0
            expected = model(tokens, attention_mask=mask, use_cache=False).logits.double()
            actual = compiled(tokens, attention_mask=mask, use_cache=False).logits
            assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [build, build_mixed])
def test_a_decoding_step_is_one_graph_without_a_look_at_the_host(make, backend):
    """Rows of unequal lengths, over several chunks of 8, by one graph that never changes."""
    torch._dynamo.reset()
    model = make()
    tokens, mask = torch.randint(64, (3, 21)), torch.ones(3, 21, dtype=torch.int64)
    mask[0, :9], mask[1, :17] = 0, 0
    graphs = []

    def count(graph, inputs):
        targets = {str(node.target) for node in graph.graph.nodes}
        assert not targets & {"item", "cpu", "tolist", "numpy"}
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        caches = [MegalodonCache(model.config, max_length=60) for _ in range(2)]
        for cache in caches:
            model(tokens, attention_mask=mask, past_key_values=cache)
        places = [z.data_ptr() for s in caches[1].states for z in s.values() if torch.is_tensor(z)]
        step, one = torch.tensor([[3], [5], [7]]), torch.ones(3, 1, dtype=torch.int64)
        for index in range(30):
            # One row pauses now and then.
            one[2] = index % 5 > 0
            expected = model(step, attention_mask=one, past_key_values=caches[0]).logits
            actual = compiled(step, attention_mask=one, past_key_values=caches[1]).logits
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
            step = expected.argmax(-1)
        assert torch.equal(caches[1].seen, torch.tensor([42, 34, 45]))
        after = [z.data_ptr() for s in caches[1].states for z in s.values() if torch.is_tensor(z)]
    assert len(graphs) == 1 and places == after


@pytest.mark.slow
def test_generate_compiles_its_steps_where_it_is_asked_to():
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, graphs = build(), []
    config = CompileConfig(backend=lambda graph, inputs, **_: graphs.append(graph) or graph.forward)
    config._compile_all_devices = True
    tokens = torch.randint(64, (2, 21))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=30, do_sample=False)
    expected = model.generate(tokens, **options)
    options |= dict(compile_config=config, cache_implementation="static")
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(graphs) == 1


def test_a_compiled_model_trains():
    torch._dynamo.reset()
    model = build(**SMALL).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(64, (2, 75))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, parameters)
    actual = torch.autograd.grad(compiled(tokens, labels=tokens).loss, parameters)
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b.double()) < 1e-4
