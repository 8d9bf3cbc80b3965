"""Arguments that ask something of a GPU which the CPU stand-in has no answer to."""

from __future__ import annotations

from argparse import Namespace

import torch

NEED_A_GPU = {
    "log_straggler": "reads GPUs' temperature, power and clock",
    "log_energy": "reads GPUs' energy",
    "record_memory_history": "records GPUs' memory",
    "profile": "starts the CUDA profiler",
}


def count_gpus() -> int:
    """How many there are; not torch.cuda's answer, which may be the CPU stand-in's."""
    return getattr(torch._C, "_cuda_getDeviceCount", int)()


def check_gpu_arguments(args: Namespace) -> None:
    """Checks that what needs a GPU has one.

    Raises:
        ValueError: an argument that has none; one sentence names it.
    """
    if count_gpus():
        return
    for name, what in NEED_A_GPU.items():
        if getattr(args, name, False) and not (name == "profile" and args.use_pytorch_profiler):
            instead = "add --use-pytorch-profiler" if name == "profile" else "leave it out"
            raise ValueError(
                f"--{name.replace('_', '-')} is set, which {what}, and there is none; {instead}."
            )
