"""Shared fixtures: Megatron's process groups in this process, and workers, all on the CPU."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    """Gives each process of `pytest -n` one thread: together they fill the cores.

    They get this process's environment, which numpy reads before this file and torch after it.
    """
    if getattr(config.option, "numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def attention_backend():
    """Megatron writes a model's into the environment, where another's would contradict it."""
    yield
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


@pytest.fixture
def megatron():
    """Megatron's model-parallel groups of a single gloo process, seeded."""
    from megalodon_mcore import cpu

    stand_in = cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    stand_in.undo()


@pytest.fixture
def load_model(megatron):
    """load_model of examples/megatron_model.py, of which a process has one at a time."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    from megalodon_mcore.pretraining import prepare_megatron
    from megatron_model import load_model

    prepare_megatron()
    yield load_model
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()


@pytest.fixture(scope="session")
def workers():
    """Up to eight processes for tests of several ranks, started by the first such test."""
    from distributed.pool import Pool

    pool = Pool()
    yield pool
    pool.stop()
