"""Settings of vLLM, which it reads where it is imported; nothing is set where it is not."""

import importlib.util
import os

import torch

if importlib.util.find_spec("vllm") is not None:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
        # GiB.
        VLLM_CPU_KVCACHE_SPACE="1",
        # Small models gain nothing by threads, which would wait for each other.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        # The engine in the test's own process, which starts in seconds.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    torch.set_num_threads(1)
