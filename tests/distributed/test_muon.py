"""What Muon orthogonalizes, that it does so matrix by matrix, and alike in every layout."""

import copy

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing import load_plain_tensors
from megatron.core.optimizer import layer_wise_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import unwrap_model

from distributed.layouts import Layout, Model
from distributed.training import (
    build_chunks,
    build_optimizer,
    forward_backward,
    set_up,
    train,
)
from megalodon_mcore.layers.submodules import LINEAR_LAYERS
from megalodon_mcore.muon import Matrices, mark_no_matrix

MODEL = Model(swiglu=True, optimizer="muon").with_megalodon(rescale_nffn=True)
LEARNING_RATE = 1e-3


def build(model=MODEL):
    set_up(Layout())
    chunks = build_chunks(model, Layout())
    optimizer = build_optimizer(model, Layout(), chunks)
    assert isinstance(optimizer, ChainedOptimizer)
    return chunks, optimizer


def stepped_by():
    """Names of the parameters by the optimizer that has them."""
    (chunk,), optimizer = build()
    names = {id(parameter): name for name, parameter in chunk.named_parameters()}
    found = {}
    for part in optimizer.chained_optimizers:
        groups = part.optimizer.param_groups
        found.setdefault(type(part.optimizer).__name__, []).extend(
            names[id(parameter)] for group in groups for parameter in group["params"]
        )
    return found, list(names.values())


def test_only_weights_of_linear_layers_are_muons(workers):
    ((found, names),) = workers.run(1, stepped_by)
    muons = [n for n in names if n.split(".")[-2] in LINEAR_LAYERS and n.endswith(".weight")]
    assert len(muons) == MODEL.num_layers * len(LINEAR_LAYERS)
    assert set(found.pop("Muon")) == set(muons)
    (adams,) = found.values()
    assert set(adams) == set(names) - set(muons)


def test_the_layer_wise_optimizer_takes_the_same():
    """It, of --use-distributed-optimizer, asks a function of its own, in two modules."""
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    marked = mark_no_matrix(torch.nn.Parameter(torch.zeros(2, 2)))
    for module in (layer_wise_optimizer, megatron_optimizer):
        assert module.is_managed_by_layer_wise_optimizer(matrix)
        assert not module.is_managed_by_layer_wise_optimizer(marked)


@pytest.mark.parametrize("optimizer", ["soap", "adaptive_muon"])
def test_its_relatives_are_refused_where_one_is_built(workers, optimizer):
    with pytest.raises(ValueError, match=f"^--optimizer is {optimizer}, which takes CEMA's"):
        workers.run(1, build, Model(optimizer=optimizer))


WEIGHTS = ("mixer.linear_proj.weight", "feed_forward.linear_fc1.weight")


def updates(bf16):
    """Of the first layer's weights of two matrices: the gradient and the first step's update."""
    model = Model(swiglu=True, optimizer="muon", bf16=bf16)
    (chunk,), optimizer = build(model)
    layer = unwrap_model(chunk).decoder.layers[0]
    weights = {name: layer.get_parameter(name) for name in WEIGHTS}
    forward_backward(model, Layout(), [chunk], optimizer, 0)
    gradients = {name: weight.main_grad.clone() for name, weight in weights.items()}
    # Under bf16 what is stepped is a float32 copy.
    mains = {name: getattr(weight, "main_param", weight) for name, weight in weights.items()}
    before = {name: main.detach().clone() for name, main in mains.items()}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["weight_decay"] = 0.0
    optimizer.step()
    return {
        name: (gradients[name], (before[name] - mains[name].detach()) / LEARNING_RATE)
        for name in WEIGHTS
    }


def orthogonalized(gradient):
    scale = get_muon_scale_factor(*gradient.shape, mode="spectral")
    return newton_schulz(gradient, 5, "quintic") * scale


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_of_two_matrices_are_taken_apart(workers, bf16):
    (found,) = workers.run(1, updates, bf16)
    hidden, ffn = MODEL.hidden_size, MODEL.ffn
    cuts = {WEIGHTS[0]: ([hidden, 2 * hidden], 1), WEIGHTS[1]: ([ffn, ffn], 0)}
    for name, (sizes, axis) in cuts.items():
        gradient, update = found[name]
        apart = torch.cat([orthogonalized(g) for g in gradient.split(sizes, axis)], axis)
        assert (update - apart).norm() < 1e-3 * apart.norm()
        together = orthogonalized(gradient)
        assert (update - together).norm() > 0.1 * together.norm()


LAYOUTS = {
    "TP 2": Layout(tp=2),
    "TP 2, SP, CP 2": Layout(tp=2, sequence_parallel=True, cp=2),
    "TP 4, shared heads": Layout(tp=4, sequence_parallel=True),
    "PP 2": Layout(pp=2),
}
MODELS = {"two heads": MODEL, "one head": Model(heads=1, optimizer="muon")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_trains_like_one_process(workers, single, model, layout):
    model, layout = MODELS[model], LAYOUTS[layout]
    start, expected = single(model)
    for rank in workers.run(layout.world_size, train, model, layout, start):
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert rank.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-4)


def weights_in(*folders):
    """The linear layers' weights in checkpoints, whole, by their keys there."""
    return [
        {
            key: tensor.double()
            for key, tensor in load_plain_tensors(str(folder)).items()
            if not key.startswith("optimizer.") and ".linear_" in key and ".weight" in key
        }
        for folder in folders
    ]


@pytest.mark.parametrize("model", MODELS)
def test_every_weight_is_updated_as_in_one_process(workers, single, tmp_path, model):
    model = MODELS[model]
    start, _ = single(model)
    folders = [tmp_path / "one", tmp_path / "four"]
    for folder, layout in zip(folders, (Layout(), Layout(tp=4)), strict=True):
        workers.run(layout.world_size, train, model, layout, start, steps=1, save=folder)
    ((before, one, four),) = workers.run(1, weights_in, start, *folders)
    # linear_proj is two there, and so is SwiGLU's linear_fc1.
    assert len(one) == len(LINEAR_LAYERS) + 1
    for key, weight in one.items():
        update = weight - before[key]
        assert (four[key] - weight).norm() < 1e-3 * update.norm(), key


def first_layers_weights(model, layout):
    set_up(layout)
    (chunk,) = build_chunks(model, layout)
    layer = unwrap_model(chunk).decoder.layers[0]
    names = ("mixer.linear_z.weight", *WEIGHTS)
    return {name: layer.get_parameter(name) for name in names}


def test_marked_weights_can_be_pickled_and_copied(workers):
    """As they are on their way from the workers. (Megatron's modules cannot, which hold groups.)"""
    model = Model(heads=1, swiglu=True, optimizer="muon")
    hidden, ffn = model.hidden_size, model.ffn
    for weights in workers.run(4, first_layers_weights, model, Layout(tp=4)):
        assert copy.deepcopy([weight.megalodon_matrices for weight in weights.values()]) == [
            Matrices([hidden // 4], axis=0, ranks_per_part=4),
            Matrices([hidden // 4, 2 * hidden // 4], axis=1),
            Matrices([ffn // 4, ffn // 4], axis=0),
        ]
