"""The random state that numbers are drawn from, so that ranks agree where they hold the same.

Under sequence parallelism Megatron's TransformerBlock runs its layers with the random state that
differs between tensor-parallel ranks; otherwise with the one they have in common.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megalodon_mcore.parallel.tensor_split import TensorSplit


def for_own_part(split: TensorSplit) -> AbstractContextManager:
    """For what each tensor-parallel rank holds another part of."""
    if split.size == 1 or split.sequence_parallel:
        return nullcontext()
    return get_cuda_rng_tracker().fork()


def for_common_part(split: TensorSplit) -> AbstractContextManager:
    """For what every tensor-parallel rank computes alike."""
    if split.size == 1 or not split.sequence_parallel:
        return nullcontext()
    return get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name())


def for_first_values(config: TransformerConfig) -> AbstractContextManager:
    """For parameters that every tensor-parallel rank draws whole.

    The default state is no place for them on a GPU: Megatron's warm-up has drawn from it by then,
    as often as the micro-batch and its cut have it.
    """
    if config.use_cpu_initialization or not config.perform_initialization:
        return nullcontext()
    return get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name())
