"""What is made of apex: found, it is used by Megatron's switches; absent, it goes unmentioned."""

import functools
import sys
import warnings

import pytest
import torch
from megatron.core.fusions import fused_layer_norm
from torch.nn import functional as F

from building import transformer_config
from megalodon_mcore import missing_kernels, pretrain_arguments
from megalodon_mcore.layers.apex_norm import ApexLayerNorm
from megalodon_mcore.layers.norms import LayerNorm
from megalodon_mcore.spec import MegalodonSpec

SWITCHES = ("gradient_accumulation_fusion", "no_persist_layer_norm", "masked_softmax_fusion")


def defaults(monkeypatch, installed):
    monkeypatch.setattr(missing_kernels, "is_installed", lambda module: installed)
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    return pretrain_arguments._defaults()


def test_megatrons_switches_are_left_alone_where_apex_is(monkeypatch):
    assert not set(SWITCHES) & defaults(monkeypatch, installed=True).keys()
    found = defaults(monkeypatch, installed=False)
    assert [found[name] for name in SWITCHES] == [False, True, False]


@pytest.fixture
def apex(monkeypatch):
    """Torch's layer norm in the place of apex's two kernels; lists which is called."""
    calls = []

    def kernel(name, apply):
        def forward(ctx, *arguments):
            raise NotImplementedError

        members = {"forward": staticmethod(forward), "apply": staticmethod(apply)}
        monkeypatch.setattr(fused_layer_norm, name, type(name, (), members), raising=False)

    def persistent(x, weight, bias, eps):
        calls.append("persistent")
        assert x.dtype == weight.dtype == bias.dtype == torch.float32
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def fused(x, weight, bias, shape, eps):
        calls.append("fused")
        return F.layer_norm(x, shape, weight, bias, eps)

    kernel("FastLayerNormFN", persistent)
    kernel("FusedLayerNormAffineFunction", fused)
    monkeypatch.setattr(fused_layer_norm, "HAVE_PERSIST_LAYER_NORM", True)
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", True)
    return calls


@pytest.mark.parametrize(("hidden_size", "used"), [(1024, "persistent"), (48, "fused")])
def test_its_norms_compute_what_ours_do(apex, hidden_size, used):
    # Two orders of float32 sums round to the same bf16 but for one number in some thousands.
    torch.manual_seed(0)
    config = transformer_config(persist_layer_norm=True, normalization="RMSNorm")
    builder = MegalodonSpec().layer_submodules(config).feed_forward_norm
    assert isinstance(builder, functools.partial) and builder.func is ApexLayerNorm
    norm, ours = builder(hidden_size, 1e-5), LayerNorm(hidden_size, 1e-5)
    assert {n: p.shape for n, p in norm.named_parameters()} == {
        n: p.shape for n, p in ours.named_parameters()
    }
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    norm.load_state_dict(ours.state_dict())
    norm.bfloat16()
    assert norm.weight.dtype == torch.float32
    x = torch.randn(5, 2, hidden_size, dtype=torch.bfloat16)
    assert torch.equal(norm(x), ours(x))
    assert apex == [used]


def test_ours_are_used_without_apex_or_where_the_switch_is_off(apex, monkeypatch):
    off = transformer_config(persist_layer_norm=False)
    assert MegalodonSpec().layer_submodules(off).feed_forward_norm is LayerNorm
    monkeypatch.setattr(fused_layer_norm, "HAVE_PERSIST_LAYER_NORM", False)
    on = transformer_config(persist_layer_norm=True)
    assert MegalodonSpec().layer_submodules(on).feed_forward_norm is LayerNorm


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("installed", [False, True])
def test_what_is_missing_is_said_at_most_once(monkeypatch, capsys, gpu, installed):
    monkeypatch.setattr(missing_kernels, "is_installed", lambda module: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("RANK", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        missing_kernels.ignore_warnings()
        missing_kernels.say_on_a_gpu()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("Transformer Engine and Apex are not installed. Falling", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]
    assert capsys.readouterr().err.count("\n") == (1 if gpu and not installed else 0)
