"""Which implementation is picked, and what is said where none can be."""

import pytest
import torch
from megalodon_mcore.kernels import dispatch
from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.kernels.dispatch import use_triton


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("MEGALODON_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.device("cpu"):
        yield


class OnCard:
    """What use_triton asks of a tensor, answered as on a CUDA device."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype

    def get_device(self):
        return 0


@pytest.mark.parametrize(
    ("dtype", "capability", "picked"),
    [
        (torch.float32, (8, 0), True),
        (torch.bfloat16, (10, 0), True),
        (torch.float64, (9, 0), False),
        (torch.float16, (9, 0), True),
        (torch.float32, (7, 5), False),
    ],
)
def test_a_card_takes_triton(monkeypatch, dtype, capability, picked):
    monkeypatch.setattr(dispatch, "_new_enough", lambda device: capability >= (8, 0))
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    assert use_triton(OnCard(dtype), None) is picked
    monkeypatch.setenv("MEGALODON_KERNELS", "torch")
    assert use_triton(OnCard(dtype)) is False
    monkeypatch.setenv("MEGALODON_KERNELS", "")
    assert use_triton(OnCard(dtype), torch.zeros(1)) is False
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert use_triton(OnCard(dtype)) is False


def test_the_cpu_takes_torch():
    assert use_triton(torch.zeros(1)) is False


def test_triton_can_be_forced_only_where_it_runs(monkeypatch):
    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    assert use_triton(torch.zeros(1, dtype=torch.float64)) is False
    parameters = [torch.zeros(2, 3, 1)] * 2 + [torch.zeros(2, 1, 1), torch.zeros(2, 3, 2)]
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        cema(torch.zeros(1, 20, 2), *parameters, torch.zeros(2, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1)) is True
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        use_triton(torch.zeros(1))


def test_a_wrong_choice_is_named(monkeypatch):
    monkeypatch.setenv("MEGALODON_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda'; it must be torch, triton or unset"):
        use_triton(torch.zeros(1))
