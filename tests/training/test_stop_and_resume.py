"""Training that stops and resumes is the same, to the last bit, as training that never stopped."""

import functools

import pytest

from training.runs import DROPOUT, TINY, save_to, side_by_side, train

STOP = 3
ASYNC = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
DISTRIBUTED = ("--bf16", "--use-distributed-optimizer")
MUON = ("--optimizer", "muon")
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def never_stopping(tmp_path_factory):
    """Trains without a stop, once for each set of options."""

    @functools.cache
    def run(*options: str):
        return train(tmp_path_factory.mktemp("never_stopping"), *TINY, *DROPOUT, *options)

    return run


def stop_and_resume(folder, *options):
    """The run that stops after STOP iterations and the one that goes on from its checkpoint."""
    common = (*TINY, *DROPOUT, *options, *save_to(folder / "checkpoint"))
    stopped = train(folder / "stopped", *common, "--exit-interval", str(STOP))
    resumed = train(folder / "resumed", *common, "--load", str(folder / "checkpoint"))
    return stopped, resumed


@pytest.mark.parametrize(
    ("options", "save_options"),
    [
        pytest.param((), (), id="float32"),
        pytest.param((), ASYNC, id="float32-async"),
        pytest.param(("--bf16",), (), id="bf16"),
        pytest.param(DISTRIBUTED, (), id="bf16-distributed"),
        pytest.param(DISTRIBUTED, ASYNC, id="bf16-distributed-async", marks=slow),
        pytest.param(DISTRIBUTED, (RESHARDABLE,), id="bf16-distributed-reshardable", marks=slow),
        pytest.param(("--swiglu", "--megalodon-rescale-nffn"), (), id="swiglu", marks=slow),
        pytest.param((*MUON, "--swiglu"), (), id="muon"),
        pytest.param((*MUON, "--bf16"), (), id="muon-bf16", marks=slow),
        pytest.param((*MUON, *DISTRIBUTED), (), id="muon-bf16-distributed", marks=slow),
    ],
)
def test_resuming_changes_nothing(never_stopping, tmp_path, options, save_options):
    whole, (stopped, resumed) = side_by_side(
        lambda: never_stopping(*options),
        lambda: stop_and_resume(tmp_path, *options, *save_options),
    )
    assert list(stopped.losses) == [1, 2, 3] and list(resumed.losses) == [4, 5, 6]
    assert stopped.losses | resumed.losses == whole.losses
    assert stopped.gradient_norms | resumed.gradient_norms == whole.gradient_norms
    assert len(set(whole.losses.values())) == 6
