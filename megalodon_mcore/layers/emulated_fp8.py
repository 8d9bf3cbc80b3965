"""Megatron's parallel linear layers with emulated FP8 products, for experiments on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from megalodon_mcore.kernels.fp8_linear import RECIPES, fp8_linear
from megalodon_mcore.layers.submodules import LINEAR_LAYERS, MegalodonLayerSubmodules


def with_emulated_fp8(
    submodules: MegalodonLayerSubmodules, recipe: str, layers: Iterable[str]
) -> MegalodonLayerSubmodules:
    """The same with these linear layers in emulated FP8.

    Raises:
        ValueError: the recipe or a layer is unknown; one sentence names what is known.
    """
    if recipe not in RECIPES:
        raise ValueError(f"--megalodon-emulated-fp8 is {recipe}; it takes {', '.join(RECIPES)}.")
    for name in layers:
        if name not in LINEAR_LAYERS:
            raise ValueError(
                f"--megalodon-emulated-fp8-layers has {name}; it takes {', '.join(LINEAR_LAYERS)}."
            )
    changed = {name: partial(EMULATED[getattr(submodules, name)], recipe=recipe) for name in layers}
    return dataclasses.replace(submodules, **changed)


class EmulatedFp8Backend(LocalSpecProvider):
    """Megatron's own layers beside the blocks, and in experts, with emulated FP8 products.

    A layer's linear layers are called as a block's are; an attention layer's first goes with
    linear_proj.
    """

    def __init__(self, recipe: str, layers: Iterable[str]) -> None:
        self.recipe, self.layers = recipe, set(layers)

    def column_parallel_linear(self) -> Callable[..., nn.Module]:
        """Builds a first linear layer."""
        return partial(self._build, ColumnParallelLinear)

    def row_parallel_linear(self) -> Callable[..., nn.Module]:
        """Builds a second linear layer."""
        return partial(self._build, RowParallelLinear)

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., nn.Module]:
        """Builds a layer's experts."""
        linears = (self.column_parallel_linear(), self.row_parallel_linear())
        return partial(SequentialMLP, submodules=MLPSubmodules(*linears))

    def _build(self, kind: type, *args: Any, tp_comm_buffer_name: str, **kwargs: Any) -> nn.Module:
        kwargs["tp_comm_buffer_name"] = tp_comm_buffer_name
        name = {"qkv": "linear_proj"}.get(tp_comm_buffer_name, f"linear_{tp_comm_buffer_name}")
        if name not in self.layers:
            return kind(*args, **kwargs)
        return EMULATED[kind](*args, recipe=self.recipe, **kwargs)


class _EmulatedFp8:
    """Replaces the product in Megatron's layers, and what they leave to it of communication.

    `recipe` may change from pass to pass; None computes as Megatron's layer does. Per-tensor scales
    are those of a rank's part, so they differ between tensor-parallel sizes.
    """

    def __init__(self, *args: Any, recipe: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe: str | None = recipe

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.recipe is None:
            return super()._forward_impl(input=input, weight=weight, **options)
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=options["tp_group"])
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        return fp8_linear(input, weight, options["bias"], self.recipe)


class Fp8ColumnParallelLinear(_EmulatedFp8, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear; `recipe` as fp8_linear takes it."""


class Fp8RowParallelLinear(_EmulatedFp8, RowParallelLinear):
    """Megatron's RowParallelLinear; `recipe` as fp8_linear takes it."""


EMULATED = {
    ColumnParallelLinear: Fp8ColumnParallelLinear,
    RowParallelLinear: Fp8RowParallelLinear,
}
