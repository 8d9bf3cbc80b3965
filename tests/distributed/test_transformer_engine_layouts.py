"""Blocks of Transformer Engine's modules in tensor-parallel layouts, and checkpoints across specs.

The modules run by transformer_engine_reference; their own kernels need a GPU.
"""

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from comparing import error
from distributed import checkpoints
from distributed.gradients import assemble, gradient_shards
from distributed.layouts import Layout, Model, build_chunk, configuration
from distributed.training import (
    build_chunks,
    finalize_model_grads,
    forward_backward,
    get_model_config,
    mean_loss,
    save_randomized,
    set_up,
)
from transformer_engine_reference import running_on_cpu

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(
        find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]

ONE_HEAD = Model(heads=1, swiglu=True).with_megalodon(rescale_nffn=True)
LAYOUTS = {
    "one rank": (Model(), Layout()),
    "one rank, recompute": (Model(), Layout(recompute="selective")),
    "TP 2": (Model(swiglu=True), Layout(tp=2)),
    "TP 2, SP": (Model(), Layout(tp=2, sequence_parallel=True)),
    "TP 2, one head": (ONE_HEAD, Layout(tp=2)),
    "TP 4, SP, one head": (ONE_HEAD, Layout(tp=4, sequence_parallel=True)),
    "TP 2, SP, CP 2": (Model(), Layout(tp=2, sequence_parallel=True, cp=2)),
}


def loss_and_gradients(model, layout, start):
    """Of the first step from a checkpoint; as distributed.training, but without an optimizer.

    (With Transformer Engine installed, Megatron's is one for GPUs.)
    """
    set_up(layout)
    chunks = build_chunks(model, layout)
    checkpoints.load(start, chunks, None)
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    with running_on_cpu():
        optimizer = SimpleNamespace(zero_grad=lambda: None)
        losses = forward_backward(model, layout, chunks, optimizer, 0)
    return mean_loss(losses), gradient_shards(chunks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_local_spec(workers, tmp_path, name):
    model, layout = LAYOUTS[name]
    workers.run(1, save_randomized, model, tmp_path)
    ((loss, shards),) = workers.run(1, loss_and_gradients, model, Layout(), tmp_path)
    wanted = assemble([shards])
    layout = replace(layout, transformer_impl="transformer_engine")
    ranks = workers.run(layout.world_size, loss_and_gradients, model, layout, tmp_path)
    gradients = assemble([rank[1] for rank in ranks])
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        assert error(gradient, wanted[key]) < 1e-4, key
    for rank in ranks:
        assert rank[0] == pytest.approx(loss, rel=1e-5)


def copy_checkpoint(model, layout, read, written):
    """Loads a checkpoint into a model of the layout and writes what that then holds."""
    set_up(layout)
    chunk = build_chunk(model, layout, configuration(model, layout))
    checkpoints.load(read, [chunk], None)
    checkpoints.save(written, [chunk], None, step=0)


def parameters(model, folder):
    set_up(Layout())
    chunk = build_chunk(model, Layout(), configuration(model, Layout()))
    checkpoints.load(folder, [chunk], None)
    return dict(chunk.named_parameters())


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(tp=4, sequence_parallel=True)],
    ids=["one rank", "TP 2", "TP 4, SP"],
)
def test_a_checkpoint_goes_to_transformer_engine_and_back(workers, tmp_path, layout):
    there, back = tmp_path / "there", tmp_path / "back"
    engine = replace(layout, transformer_impl="transformer_engine")
    workers.run(1, save_randomized, ONE_HEAD, tmp_path / "start")
    workers.run(engine.world_size, copy_checkpoint, ONE_HEAD, engine, tmp_path / "start", there)
    workers.run(layout.world_size, copy_checkpoint, ONE_HEAD, layout, there, back)
    (start,), (end,) = (
        workers.run(1, parameters, ONE_HEAD, folder) for folder in (tmp_path / "start", back)
    )
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)
