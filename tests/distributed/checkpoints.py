"""Megatron's torch_dist checkpoints of model and optimizer, as its training loop writes them."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn


def save(folder: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer | None, step: int):
    """Writes the model and, where given, the optimizer."""
    state = {**sharded_state(chunks, optimizer, is_loading=False), "step": step}
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(folder), content_metadata={}, async_strategy="mcore")


def load(folder: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> int:
    """Reads the model and, where given, the optimizer; returns the step that was saved."""
    state = dist_checkpointing.load(sharded_state(chunks, optimizer, is_loading=True), str(folder))
    for name, chunk in zip(model_names(chunks), unwrap_model(chunks), strict=True):
        chunk.load_state_dict(state[name], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def sharded_state(
    chunks: list[nn.Module], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(model_names(chunks), unwrap_model(chunks), strict=True)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
    return state


def model_names(chunks: list[nn.Module]) -> list[str]:
    """Megatron's names of a rank's virtual pipeline stages."""
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]
