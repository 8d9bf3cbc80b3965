"""Corrections of Megatron: each is needed where it is made, and is not made where it is not."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from distributed.layouts import Layout, Model
from distributed.training import train
from megalodon_mcore import megatron_fixes

BF16 = Model(bf16=True)
PLAIN = Layout()
DISTRIBUTED = Layout(distributed_optimizer=True, bucket_size=None)


@dataclass(frozen=True)
class Correction:
    """A corrected method, and training that cannot be resumed without."""

    owner: type
    method: str
    model: Model
    layout: Layout


CORRECTIONS = [
    Correction(DistributedOptimizer, "_build_optimizer_group_ranges", BF16, DISTRIBUTED),
    Correction(DistributedOptimizer, "_set_main_param_and_optimizer_states", BF16, DISTRIBUTED),
    Correction(DistributedOptimizer, "state_dict", Model(), DISTRIBUTED),
    Correction(DistributedOptimizer, "load_state_dict", Model(), DISTRIBUTED),
    Correction(Float16OptimizerWithFloat16Params, "sharded_state_dict", BF16, PLAIN),
    Correction(Float16OptimizerWithFloat16Params, "load_state_dict", BF16, PLAIN),
    Correction(
        DistributedOptimizer,
        "sharded_param_state_fully_reshardable",
        Model(),
        Layout(distributed_optimizer=True, dp=2),
    ),
]


def train_without(correction, *args, **kwargs):
    """Trains with Megatron's own method in the correction's place."""
    ours = vars(correction.owner)[correction.method]
    setattr(correction.owner, correction.method, ours.corrects)
    try:
        return train(*args, **kwargs)
    finally:
        setattr(correction.owner, correction.method, ours)


def is_made(correction):
    return hasattr(vars(correction.owner)[correction.method], "corrects")


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda correction: correction.method)
def test_resuming_needs_each_that_is_made(workers, single, tmp_path, correction):
    if not is_made(correction):
        pytest.skip("Megatron needs no correction of it here.")
    model, layout = correction.model, correction.layout
    start, uninterrupted = single(model)

    def stop_and_resume(folder, run, *first):
        workers.run(layout.world_size, run, *first, model, layout, start, steps=1, save=folder)
        (losses, *_) = (
            rank.losses
            for rank in workers.run(
                layout.world_size, run, *first, model, layout, folder, steps=2, resume=True
            )
        )
        return losses

    expected = pytest.approx(uninterrupted.losses[1:], rel=1e-5)
    assert stop_and_resume(tmp_path / "with", train) == expected
    try:
        losses = stop_and_resume(tmp_path / "without", train_without, correction)
    except Exception as error:
        # What Megatron says where it does not go wrong silently.
        assert not isinstance(error, TimeoutError | pytest.fail.Exception)
    else:
        assert losses != expected


def test_0_19_gets_them_all_and_main_no_second_subtraction():
    from megatron.core.package_info import __version__

    made = {correction.method for correction in CORRECTIONS if is_made(correction)}
    missing = {correction.method for correction in CORRECTIONS} - made
    if __version__.startswith("0.19."):
        assert not missing
    else:
        assert "sharded_param_state_fully_reshardable" in missing


def test_every_megatron_writes_the_keys_of_0_19(workers, single, tmp_path):
    start, _ = single(BF16)
    workers.run(1, train, BF16, PLAIN, start, steps=1, save=tmp_path)
    keys = {key for key in load_tensors_metadata(str(tmp_path)) if "_extra_state" not in key}
    saved = {key for key in keys if not key.startswith("optimizer.")}
    assert {"decoder.layers.mixer.cema.alpha", "decoder.layers.mixer.linear_v.weight"} < saved
    states = ("exp_avg", "exp_avg_sq", "fp32_param")
    assert keys - saved == {f"optimizer.state.{state}.{key}" for state in states for key in saved}


@pytest.fixture
def apply_anew(monkeypatch):
    """Puts methods in Megatron's place and applies the corrections to them."""
    for correction in CORRECTIONS:
        method = vars(correction.owner)[correction.method]
        monkeypatch.setattr(correction.owner, correction.method, method)

    def apply(**methods):
        for name, method in methods.items():
            monkeypatch.setattr(DistributedOptimizer, name, method)
        monkeypatch.setattr(megatron_fixes.apply, "done", False, raising=False)
        megatron_fixes.apply()
        return [vars(DistributedOptimizer)[name] for name in methods]

    return apply


def test_what_the_installed_code_does_itself_is_left_alone(apply_anew):
    def subtracts_padding(self):
        return [bucket.numel_unpadded for bucket in self.buffers[0].buckets]

    def sets_state(self, model_param, tensors):
        with torch.no_grad():
            return tensors

    def keeps_step(self):
        return self.optimizer.state_dict()

    methods = {
        "sharded_param_state_fully_reshardable": subtracts_padding,
        "_set_main_param_and_optimizer_states": sets_state,
        "state_dict": keeps_step,
    }
    assert apply_anew(**methods) == list(methods.values())
    buffers = [SimpleNamespace(buckets=[SimpleNamespace(numel_unpadded=5)])]
    optimizer = SimpleNamespace(buffers=buffers)
    assert DistributedOptimizer.sharded_param_state_fully_reshardable(optimizer) == [5]


def test_an_order_that_is_right_is_left_alone(apply_anew):
    def float32_first(cls, param_groups, gbuf_ranges):
        (group,) = param_groups
        params = sorted(group["params"], key=lambda param: param.dtype != torch.float32)
        return {param: (0, place) for place, param in enumerate(params)}, [{"params": params}]

    method = classmethod(float32_first)
    assert apply_anew(_build_optimizer_group_ranges=method) == [method]


def test_the_newest_checkpoint_is_known_while_it_is_noted(tmp_path):
    from megatron.training import checkpointing

    megatron_fixes.write_trackers_whole()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for before, after in (("", "7"), ("7", "12")):
        with checkpointing.maybe_msc.open(str(tracker), "w") as file:
            file.write(after)
            assert (tracker.read_text() if tracker.exists() else "") == before
        with checkpointing.maybe_msc.open(str(tracker), "r") as file:
            assert file.read() == after
    assert checkpointing.maybe_msc.os.path.isfile(str(tracker))
