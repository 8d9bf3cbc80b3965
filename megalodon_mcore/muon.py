"""The matrices that Muon orthogonalizes: each one of Megalodon's linear layers alone.

Megatron's Muon takes every two-dimensional parameter that is neither embedding nor output for one
matrix. Layers say here where that is wrong: CEMA's omega and the affine of queries and keys are
lists of numbers, and some weights hold two matrices, or one that ranks share.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import emerging_optimizers, layer_wise_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamPredicate
from torch import Tensor
from torch.distributed import ProcessGroup

from megalodon_mcore.optimizer_check import check_optimizer
from megalodon_mcore.parallel.subgroups import subgroup


@dataclass(frozen=True)
class Matrices:
    """The matrices in a rank's part of a weight, which Muon orthogonalizes one by one.

    Plain numbers, which a copied parameter keeps as its `megalodon_matrices`.

    Args:
        sizes: their extents along `axis`, side by side.
        axis: along which tensor-parallel ranks cut each, too.
        ranks_per_part: so many neighbouring ranks have the same part.
    """

    sizes: Sequence[int]
    axis: int
    ranks_per_part: int = 1


def mark_no_matrix(parameter: Tensor) -> Tensor:
    """Leaves a parameter to Adam, by the mark that Megatron-LM's main has for it."""
    parameter.use_muon = False
    return parameter


def is_left_to_adam(parameter: Tensor) -> bool:
    """Whether mark_no_matrix was called."""
    return not getattr(parameter, "use_muon", True)


def apply() -> None:
    """Lets Megatron's Muon go by the marks; where it knows that of Adam, it keeps its own way."""
    entry = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
    if entry.optimizer_cls is Muon:
        return
    entry.optimizer_cls = Muon
    marked = mark_no_matrix(torch.nn.Parameter(torch.zeros(2, 2)))
    if not any(key.matches(marked, "weight") for key in entry.default_param_overrides):
        key = ParamKey(predicate=ParamPredicate(name="left_to_adam", fn=is_left_to_adam))
        entry.default_param_overrides[key] = {"optimizer": "adam"}
    takes = layer_wise_optimizer.is_managed_by_layer_wise_optimizer
    if takes(marked):
        # With --use-distributed-optimizer it decides by itself which buffers are Muon's.
        def takes_unmarked(param: torch.nn.Parameter) -> bool:
            return takes(param) and not is_left_to_adam(param)

        for module in (layer_wise_optimizer, megatron_optimizer):
            module.is_managed_by_layer_wise_optimizer = takes_unmarked
    _check_where_one_is_built()


def _check_where_one_is_built() -> None:
    """Refuses Muon's relatives where no spec sees the optimizer's arguments, as with Bridge."""
    name = "_get_megatron_emerging_optimizer"
    build = getattr(megatron_optimizer, name)

    @functools.wraps(build)
    def build_checked(
        config: OptimizerConfig,
        model_chunks: list[torch.nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> MegatronOptimizer:
        parameters = (p for chunk in model_chunks for p in chunk.parameters())
        if any(hasattr(parameter, "megalodon_matrices") for parameter in parameters):
            check_optimizer(config)
        return build(config, model_chunks, *args, **kwargs)

    setattr(megatron_optimizer, name, build_checked)


class Muon(emerging_optimizers.TensorParallelMuon):
    """Megatron's Muon, with weights of several matrices orthogonalized matrix by matrix."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        # Under --bf16 it steps main copies of the parameters, which have not all of their marks.
        self._weights = [
            param
            for group in self.param_groups
            for param in group["params"]
            if hasattr(param, "megalodon_matrices")
        ]

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The update for a parameter or its main copy, from its momentum."""
        matrices = self._matrices_of(p)
        if matrices is None:
            return super().orthogonalize(p, grad, **kwargs)
        group = self._group_of(matrices)
        partition_dim = None if self.tp_mode == "blockwise" else matrices.axis
        updates = [
            self.scaled_orthogonalize_fn(part.contiguous(), group, partition_dim)
            for part in grad.split(list(matrices.sizes), matrices.axis)
        ]
        return torch.cat(updates, matrices.axis)

    def _matrices_of(self, p: Tensor) -> Matrices | None:
        for weight in self._weights:
            if p is weight or p is getattr(weight, "main_param", None):
                return weight.megalodon_matrices
        return None

    def _group_of(self, matrices: Matrices) -> ProcessGroup:
        """One rank for each part of these matrices, this rank for its own."""
        group, each = self.pg_collection.tp, matrices.ranks_per_part
        if each == 1:
            return group
        ranks = torch.distributed.get_process_group_ranks(group)
        return subgroup(tuple(ranks[group.rank() % each :: each]))
