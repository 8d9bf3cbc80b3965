"""What the fork server imports, once, so that starting a worker of the pool is only a fork."""

import gc
import os
import queue

for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Asks in a way that leaves torch.cuda usable in forked processes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch  # noqa: E402

from distributed.pool import WORKERS  # noqa: E402
from megalodon_mcore import cpu  # noqa: E402

torch.set_num_threads(1)
cpu.install(devices=WORKERS)

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

import distributed.training  # noqa: E402, F401

# Megatron would start a process for it in every worker that writes a part of a checkpoint, which
# only a writer in another process needs.
filesystem_async._results_queue = queue.Queue()

# Spares the workers, which collect after every task, the look at all that was imported.
gc.freeze()
