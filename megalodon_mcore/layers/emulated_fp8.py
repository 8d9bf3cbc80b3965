"""Megatron's parallel linear layers with emulated FP8 products, for experiments on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

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
    builders = {
        ColumnParallelLinear: Fp8ColumnParallelLinear,
        RowParallelLinear: Fp8RowParallelLinear,
    }
    changed = {name: partial(builders[getattr(submodules, name)], recipe=recipe) for name in layers}
    return dataclasses.replace(submodules, **changed)


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
