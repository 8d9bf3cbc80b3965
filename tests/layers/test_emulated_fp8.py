"""Linear layers in emulated FP8: which are, what ranks compute of them, how they are chosen."""

import pytest
import torch
from megalodon_mcore.kernels.fp8_linear import fp8_linear
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear

from building import build, randomize, transformer_config
from comparing import error
from distributed.layouts import Layout
from distributed.training import set_up
from megalodon_mcore.layers.emulated_fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megalodon_mcore.layers.submodules import LINEAR_LAYERS
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.spec import MegalodonSpec


def spec(recipe="blockwise", layers=LINEAR_LAYERS) -> MegalodonSpec:
    return MegalodonSpec(SIZES["200m"], emulated_fp8=recipe, emulated_fp8_layers=layers)


def emulating(model) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, Fp8ColumnParallelLinear | Fp8RowParallelLinear)
    }


@pytest.mark.parametrize("layers", [LINEAR_LAYERS, ("linear_z",), ("linear_proj", "linear_fc1")])
def test_the_chosen_layers_emulate_fp8_and_the_rest_does_not(megatron, layers):
    options = dict(emulated_fp8="tensorwise", emulated_fp8_layers=layers)
    model, _ = build(dict(chunk_size=8), swiglu=True, **options)
    plain, _ = build(dict(chunk_size=8), swiglu=True)
    assert emulating(model) == set(layers) and emulating(plain) == set()
    randomize(plain)
    model.load_state_dict(plain.state_dict())
    tokens = torch.arange(24).view(2, 12)
    losses = []
    for each in (plain, model):
        loss = each(tokens, None, None, labels=tokens).mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    for (name, exact), (_, emulated) in zip(
        plain.named_parameters(), model.named_parameters(), strict=True
    ):
        assert emulated.grad.isfinite().all(), name
        # They say the same, coarsely: the cosine of two random gradients would be near 0.
        cosine = torch.cosine_similarity(exact.grad.flatten(), emulated.grad.flatten(), 0)
        assert cosine > 0.9, name


def products_of_ranks(sequence_parallel):
    """Largest errors of a column- and a row-parallel layer, which rounds as the whole one does.

    Blocks of 128 lie on one rank each, so that ranks quantize as one process does.
    """
    set_up(Layout(tp=2))
    group = parallel_state.get_tensor_model_parallel_group()
    config = transformer_config(
        tensor_model_parallel_size=2, heads=2, sequence_parallel=sequence_parallel
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, hidden, bias = random(128, 2, 128), random(128, 2, 256), random(256)
    weights, upstream = (random(256, 128), random(128, 256)), (random(128, 2, 256), x)
    common = dict(config=config, init_method=torch.nn.init.zeros_, tp_group=group)
    common |= dict(bias=True, skip_bias_add=False, recipe="blockwise")
    column = Fp8ColumnParallelLinear(128, 256, gather_output=False, **common)
    row = Fp8RowParallelLinear(256, 128, input_is_parallel=True, **common)

    def mine(tensor, dim, cut=True):
        return tensor.chunk(2, dim)[group.rank()] if cut else tensor

    errors = {}
    cases = {
        # layer, its parts of weight, bias, input and output; what of them is cut
        "column": (column, 0, bias, x, sequence_parallel and 0, 2),
        "row": (row, 1, bias[:128], hidden, 2, sequence_parallel and 0),
    }
    for number, (name, (layer, axis, b, whole, cut_in, cut_out)) in enumerate(cases.items()):
        weight, grad = weights[number], upstream[number]
        layer.weight.data.copy_(mine(weight, axis))
        layer.bias.data.copy_(mine(b, 0, axis == 0))
        own = mine(whole, int(cut_in), cut_in is not False).clone().requires_grad_()
        y, _ = layer(own)
        y.backward(mine(grad, int(cut_out), cut_out is not False))
        reference = [tensor.clone().requires_grad_() for tensor in (whole, weight, b)]
        expected = fp8_linear(*reference, "blockwise")
        expected.backward(grad)
        pairs = {
            "output": (y, mine(expected, int(cut_out), cut_out is not False)),
            "input": (own.grad, mine(reference[0].grad, int(cut_in), cut_in is not False)),
            "weight": (layer.weight.grad, mine(reference[1].grad, axis)),
        }
        for what, (actual, wanted) in pairs.items():
            errors[f"{name} {what}"] = error(actual, wanted)
    return errors


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_compute_what_one_process_does(workers, sequence_parallel):
    for errors in workers.run(2, products_of_ranks, sequence_parallel):
        assert max(errors.values()) < 1e-5, errors


def test_what_is_unknown_or_does_not_go_together_is_named(megatron):
    config = transformer_config()
    with pytest.raises(ValueError, match="--megalodon-emulated-fp8 is delayed; it takes tensorwis"):
        spec("delayed").layer_submodules(config)
    with pytest.raises(ValueError, match="--megalodon-emulated-fp8-layers has linear_q; it takes"):
        spec(layers=("linear_q",)).layer_submodules(config)
    config.transformer_impl = "transformer_engine"
    with pytest.raises(ValueError, match="with --transformer-impl transformer_engine take --fp8-"):
        spec().layer_submodules(config)


def test_arguments_come_before_the_spec(megatron, monkeypatch):
    from argparse import Namespace

    from megatron.training import global_vars

    arguments = Namespace(
        megalodon_emulated_fp8="mxfp8", megalodon_emulated_fp8_layers=["linear_v"]
    )
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", arguments)
    submodules = spec().layer_submodules(transformer_config())
    assert submodules.linear_v.keywords == {"recipe": "mxfp8"}
    assert submodules.linear_z is ColumnParallelLinear
