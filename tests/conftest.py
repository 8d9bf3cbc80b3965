"""Shared fixtures: Megatron's process groups in this process, and workers, all on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "2")


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


@pytest.fixture(scope="session")
def workers():
    """Up to eight processes for tests of several ranks, started by the first such test."""
    from distributed.pool import Pool

    pool = Pool()
    yield pool
    pool.stop()
