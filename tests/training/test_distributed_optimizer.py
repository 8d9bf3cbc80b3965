"""The distributed optimizer: checkpoints for any layout, and float32 parameters on the CPU."""

import sys

import pytest

from building import build
from megalodon_mcore import pretrain_arguments
from training.runs import TINY, launch, save_to, side_by_side, train

DISTRIBUTED = "--use-distributed-optimizer"
KEEP_LOCAL = ("--non-persistent-ckpt-type", "local")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((DISTRIBUTED,), True),
        ((), False),
        ((DISTRIBUTED, "--ckpt-format", "torch"), False),
        ((DISTRIBUTED, *KEEP_LOCAL), False),
    ],
)
def test_fully_reshardable_is_the_default_where_it_applies(monkeypatch, arguments, expected):
    from megatron.training.arguments import parse_args

    def parsed(*more):
        monkeypatch.setattr(sys, "argv", ["pretrain", *TINY, *arguments, *more])
        return parse_args(pretrain_arguments.add_megalodon_arguments)

    assert parsed().dist_ckpt_optim_fully_reshardable is None
    assert pretrain_arguments.can_save_fully_reshardable(parsed()) == expected
    # What is written stays.
    assert parsed("--dist-ckpt-optim-fully-reshardable").dist_ckpt_optim_fully_reshardable is True
    given = parsed("--no-dist-ckpt-optim-fully-reshardable")
    assert given.dist_ckpt_optim_fully_reshardable is False


def test_a_checkpoint_goes_on_in_another_layout(tmp_path):
    """With no option but the layout's."""
    saved = tmp_path / "saved"
    common = (*TINY, DISTRIBUTED, "--make-vocab-size-divisible-by", "64")
    train(tmp_path / "first", *common, *save_to(saved), "--exit-interval", "3")
    one, two = side_by_side(
        lambda: train(tmp_path / "one", *common, "--load", str(saved)),
        lambda: train(
            *(tmp_path / "two", *common, "--load", str(saved)),
            *("--tensor-model-parallel-size", "2"),
            processes=2,
        ),
    )
    assert list(one.losses) == list(two.losses) == [4, 5, 6]
    assert two.losses == pytest.approx(one.losses, rel=1e-5)


OFFLOAD = ("--optimizer-cpu-offload", "--use-precision-aware-optimizer", DISTRIBUTED)
PRECISION_AWARE = ("--use-precision-aware-optimizer", DISTRIBUTED)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (OFFLOAD, "--optimizer-cpu-offload is set, which moves the optimizer's state off a GPU"),
        (PRECISION_AWARE, "is set, which is Transformer Engine's optimizer"),
    ],
)
def test_what_this_machine_lacks_is_said_before_training(options, sentence):
    result = launch("-m", "megalodon_mcore", "pretrain", *TINY, *options)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert sentence in result.stdout


@pytest.mark.parametrize("bf16", [False, True])
def test_an_optimizer_on_the_cpu_takes_float32_parameters(megatron, bf16):
    """Built; that it steps takes a GPU."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    model, _ = build(dict(chunk_size=8), bf16=bf16)
    model = model.bfloat16() if bf16 else model
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(model.config, ddp, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=bf16,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=True,
        optimizer_cpu_offload=True,
    )
    optimizer = get_megatron_optimizer(config, [model])
    offloaded = [chained.optimizer for chained in optimizer.chained_optimizers]
    assert all(isinstance(each, HybridDeviceOptimizer) for each in offloaded)
    parts = [part for each in offloaded for group in each.param_groups for part in group["params"]]
    assert sum(part.numel() for part in parts) == sum(p.numel() for p in model.parameters())
