"""Megatron-FSDP shards Megalodon's layers, over gloo too, and trains as one process does.

Saving is another matter: over two gloo ranks, Megatron 0.19's save waits for ever, since the ranks
list different numbers of optimizer tensors in preprocess_fsdp_dtensor_state_dict.
"""

import pytest

from training.runs import TINY, train

# CUDA_DEVICE_MAX_CONNECTIONS must not be 1, and gloo cannot scale while it sums.
FSDP = (
    *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"),
    "--no-gradient-reduce-div-fusion",
)


def train_sharded(folder, *options, **environment):
    return train(
        *(folder, *TINY, *FSDP, *options),
        processes=2,
        CUDA_DEVICE_MAX_CONNECTIONS="8",
        **environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["float32", "bf16"])
def test_losses_of_one_process(tmp_path, precision):
    single = train(tmp_path / "single", *TINY, *precision)
    sharded = train_sharded(tmp_path / "sharded", *precision)
    # bf16: a bf16 sum of two ranks' gradients in place of a float32 one.
    tolerance = 2**-8 if precision else 1e-5
    assert list(sharded.losses) == list(single.losses)
    assert sharded.losses == pytest.approx(single.losses, rel=tolerance)
    assert sharded.gradient_norms == pytest.approx(single.gradient_norms, rel=tolerance)
