"""What Megatron's optimizers on the CPU or in low precision need, before anything is built."""

from __future__ import annotations

from argparse import Namespace

import torch

from megalodon_mcore import missing_kernels


def check_optimizer(args: Namespace) -> None:
    """Checks that --optimizer-cpu-offload and --use-precision-aware-optimizer can be had.

    Raises:
        ValueError: with what is missing, in a sentence.
    """
    if args.optimizer_cpu_offload:
        # Not torch.cuda, for which the CPU may stand in.
        if not getattr(torch._C, "_cuda_getDeviceCount", int)():
            raise ValueError(
                "--optimizer-cpu-offload is set, which moves the optimizer's state off a GPU, and "
                "there is none; leave it and --use-precision-aware-optimizer out."
            )
        return
    has_te = missing_kernels.is_installed("transformer_engine")
    if args.use_precision_aware_optimizer and not has_te:
        raise ValueError(
            "--use-precision-aware-optimizer is set, which is Transformer Engine's optimizer, "
            "and that is not installed; leave it out."
        )
