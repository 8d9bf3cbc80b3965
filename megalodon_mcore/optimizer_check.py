"""Megatron's optimizers that treat Megalodon's parameters right, and what each needs."""

from __future__ import annotations

from typing import Any

from megalodon_mcore.gpu_arguments import count_gpus
from megalodon_mcore.missing_kernels import is_installed

OPTIMIZERS = ("adam", "sgd", "lion", "muon", "dist_muon")


def check_optimizer(arguments: Any) -> None:
    """Checks the optimizer that is asked for.

    Args:
        arguments: Megatron's, or an OptimizerConfig; what it lacks, or None, asks for nothing.

    Raises:
        ValueError: it would do something else, or what it needs is missing; in a sentence.
    """
    name = getattr(arguments, "optimizer", None)
    if name is not None and name not in OPTIMIZERS:
        raise ValueError(
            f"--optimizer is {name}, which takes CEMA's vectors and weights of two matrices for "
            f"one matrix each; take {', '.join(OPTIMIZERS[:-2])} or {OPTIMIZERS[-2]}."
        )
    if name not in (None, "adam", "sgd") and not is_installed("emerging_optimizers"):
        raise ValueError(
            f"--optimizer is {name}, which is in the package emerging-optimizers; install its "
            "version 0.3.0 or take adam."
        )
    if getattr(arguments, "optimizer_cpu_offload", False):
        if not count_gpus():
            raise ValueError(
                "--optimizer-cpu-offload is set, which moves the optimizer's state off a GPU, and "
                "there is none; leave it and --use-precision-aware-optimizer out."
            )
        return
    is_precision_aware = getattr(arguments, "use_precision_aware_optimizer", False)
    if is_precision_aware and not is_installed("transformer_engine"):
        raise ValueError(
            "--use-precision-aware-optimizer is set, which is Transformer Engine's optimizer, "
            "and that is not installed; leave it out."
        )
