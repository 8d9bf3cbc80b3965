"""Each dropout acts where it should, and recompute repeats the same masks."""

import pytest
import torch

from building import build, randomize

DROPOUTS = {
    "hidden_dropout": dict(own=dict(chunk_size=8, hidden_dropout=0.5)),
    "dropout": dict(own=dict(chunk_size=8), hidden_dropout=0.5),
    "attention_dropout": dict(own=dict(chunk_size=8), attention_dropout=0.5),
}


def dropped_widths(layer, x, monkeypatch):
    """The last dimension of every tensor that F.dropout sees with a positive probability."""
    seen, nested = [], False
    original = torch.nn.functional.dropout

    def record(tensor, p=0.5, training=True, inplace=False):
        # Under the CPU stand-in's function mode, torch calls it again from inside.
        nonlocal nested
        if p > 0.0 and training and not nested:
            seen.append(tensor.shape[-1])
        outer, nested = nested, True
        try:
            return original(tensor, p, training, inplace)
        finally:
            nested = outer

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", record)
        layer(x)
    return seen


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        # hidden_dropout: m, a * r and the FFN's hidden; dropout: the update and the FFN's output.
        ("hidden_dropout", [32, 64, 48]),
        ("dropout", [32, 32]),
        ("attention_dropout", []),
    ],
)
def test_dropout_acts_where_it_should(megatron, monkeypatch, name, widths):
    model, _ = build(**DROPOUTS[name])
    randomize(model)
    layer = model.decoder.layers[0].train()
    x = torch.randn(21, 2, 32)
    assert dropped_widths(layer, x, monkeypatch) == widths
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert dropped_widths(layer, x, monkeypatch) == []
    assert torch.equal(layer(x)[0], layer(x)[0])


RECOMPUTE = {
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_repeats_outputs_and_gradients(megatron, name):
    def loss_and_gradients(**options):
        own = dict(chunk_size=8, hidden_dropout=0.2)
        model, _ = build(own, hidden_dropout=0.2, attention_dropout=0.2, **options)
        randomize(model)
        torch.manual_seed(5)
        tokens = torch.randint(64, (2, 21))
        loss = model.train()(tokens, None, None, labels=tokens).mean()
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}

    torch.manual_seed(1)
    expected, gradients = loss_and_gradients()
    torch.manual_seed(1)
    actual, recomputed = loss_and_gradients(**RECOMPUTE[name])
    assert torch.equal(actual, expected)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(recomputed[parameter], gradient, rtol=1e-4, atol=1e-6)
