"""How Bridge moves tensors that its own mappings have no case for.

Each takes whole Hugging Face tensors to what a tensor-parallel rank holds, and back; stages of a
pipeline that lack a parameter get it by Bridge's broadcast.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
)
from megatron.bridge.models.conversion.utils import get_module_and_param_from_name
from megatron.bridge.utils.common_utils import extract_expert_number_from_param
from torch import Tensor
from torch.nn import functional as F


class VocabularyMapping(ColumnParallelMapping):
    """Rows of tokens, which Megatron pads with zeros; an export has vocab_size of them."""

    def __init__(self, megatron_param: str, hf_param: str, vocab_size: int) -> None:
        super().__init__(megatron_param, hf_param)
        self.vocab_size = vocab_size

    def resolve(self, captures: tuple[str, ...]) -> VocabularyMapping:
        """The mapping of one layer's parameter, for patterns."""
        return type(self)(*self._resolve_names(captures), self.vocab_size)

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: torch.nn.Module) -> Tensor:
        """[vocab_size, hidden] to this rank's rows of it and its padding."""
        _, parameter = get_module_and_param_from_name(megatron_module, self.megatron_param)
        padding = parameter.shape[0] * self.tp_size - hf_weights.shape[0]
        return super().hf_to_megatron(F.pad(hf_weights, (0, 0, 0, padding)), megatron_module)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """A rank's rows to [vocab_size, hidden]."""
        whole = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: rows[: self.vocab_size] for name, rows in whole.items()}


class _SplitMapping(MegatronParamMapping):
    """Cuts on one rank and scatters; gathers and joins on all."""

    @abstractmethod
    def split(self, hf_weights: Tensor | dict[str, Tensor]) -> list[Tensor]:
        """The part of each rank of the tensor-parallel group."""

    @abstractmethod
    def join(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors of what all ranks hold, by their names."""

    def hf_to_megatron(
        self, hf_weights: Tensor | dict[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """Whole tensors to this rank's."""
        # Of an expert's name in all of the model, in which this rank's have other numbers.
        name = self._normalize_expert_param_name(self.megatron_param)
        _, parameter = get_module_and_param_from_name(megatron_module, name)
        shards = self.split(hf_weights) if self.tp_rank == 0 else None
        return self.scatter_to_tp_ranks(shards, parameter.shape, parameter.dtype, parameter.device)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """This rank's tensor to whole ones."""
        weights = self.broadcast_from_pp_rank(megatron_weights, cache_key=str(self.hf_param))
        if weights is None:
            return {}
        return self.join(self.gather_from_tp_ranks(self.maybe_dequantize(weights)))


class HeadsMapping(_SplitMapping):
    """A tensor cut by heads along an axis; with more ranks than heads, several have a head's."""

    def __init__(self, megatron_param: str, hf_param: str, axis: int, num_heads: int) -> None:
        super().__init__(megatron_param, hf_param)
        self.axis, self.num_heads = axis, num_heads

    def resolve(self, captures: tuple[str, ...]) -> HeadsMapping:
        """The mapping of one layer's parameter."""
        return type(self)(*self._resolve_names(captures), self.axis, self.num_heads)

    @property
    def ranks_per_head(self) -> int:
        """Ranks that hold the same part; 1 where each has heads of its own."""
        return max(1, self.tp_size // self.num_heads)

    def split(self, hf_weights: Tensor) -> list[Tensor]:
        """Whole heads for each rank."""
        parts = hf_weights.chunk(self.tp_size // self.ranks_per_head, dim=self.axis)
        return [part for part in parts for _ in range(self.ranks_per_head)]

    def join(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """The heads of each group's first rank."""
        return {str(self.hf_param): torch.cat(shards[:: self.ranks_per_head], dim=self.axis)}


class ColumnPartsMapping(_SplitMapping):
    """Weights [out, width] side by side in one that is cut over ranks part by part.

    A rank has the first of the first weight's columns, then the first of the second's, and so on.
    """

    def __init__(
        self, megatron_param: str, hf_param: dict[str, str], widths: dict[str, int]
    ) -> None:
        super().__init__(megatron_param, hf_param)
        self.widths = widths

    def resolve(self, captures: tuple[str, ...]) -> ColumnPartsMapping:
        """The mapping of one layer's parameter."""
        return type(self)(*self._resolve_names(captures), self.widths)

    def split(self, hf_weights: dict[str, Tensor]) -> list[Tensor]:
        """Every weight's share, side by side."""
        shares = [hf_weights[name].chunk(self.tp_size, dim=1) for name in self.widths]
        return [torch.cat(parts, dim=1) for parts in zip(*shares, strict=True)]

    def join(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """Every weight, whole."""
        widths = [width // self.tp_size for width in self.widths.values()]
        shares = [shard.split(widths, dim=1) for shard in shards]
        return {
            self.hf_param[name]: torch.cat(parts, dim=1)
            for name, parts in zip(self.widths, zip(*shares, strict=True), strict=True)
        }


class ExpertMapping(_SplitMapping):
    """An expert's weight, cut along an axis; the Hugging Face tensors are [experts, out, in].

    Several of those lie one below the other in Megatron's, as the parts of a gated linear layer.
    Bridge stacks what `join` returns once it has that of all experts.
    """

    is_grouped_export = True

    def __init__(self, megatron_param: str, hf_param: dict[str, str], axis: int) -> None:
        super().__init__(megatron_param, hf_param)
        self.axis = axis

    def resolve(self, captures: tuple[str, ...]) -> ExpertMapping:
        """The mapping of one expert's weight, by the numbers of its layer and of itself."""
        return type(self)(*self._resolve_names(captures), self.axis)

    def split(self, hf_weights: dict[str, Tensor]) -> list[Tensor]:
        """Each rank's share of every tensor, one below the other."""
        expert = extract_expert_number_from_param(self.megatron_param)
        shares = [z[expert].chunk(self.tp_size, dim=self.axis) for z in hf_weights.values()]
        return [torch.cat(parts) for parts in zip(*shares, strict=True)]

    def join(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """One expert's weights, or [ranks, out, in] of every expert-parallel rank's."""
        shares = zip(*(shard.chunk(len(self.hf_param)) for shard in shards), strict=True)
        whole = [torch.cat(parts, dim=self.axis) for parts in shares]
        if self.ep_size > 1:
            whole = [self._of_all_ranks(weight) for weight in whole]
        return dict(zip(self.hf_param.values(), whole, strict=True))

    def _of_all_ranks(self, weight: Tensor) -> Tensor:
        gathered = [torch.empty_like(weight) for _ in range(self.ep_size)]
        torch.distributed.all_gather(gathered, weight.contiguous(), group=self.ep_group)
        return torch.stack(gathered)


def parts_of(mapping: MegatronParamMapping, weight: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a linear layer's weight, by their names.

    Args:
        mapping: of that layer.
        weight: [out, in], the shares of all tensor-parallel ranks one after the other.
    """
    if isinstance(mapping, GatedMLPMapping):
        shares = [shard.chunk(2) for shard in weight.chunk(mapping.tp_size)]
        names = (mapping.hf_param["gate"], mapping.hf_param["up"])
        return {
            name: torch.cat(z) for name, z in zip(names, zip(*shares, strict=True), strict=True)
        }
    if isinstance(mapping, HeadsMapping):
        return mapping.join(list(weight.chunk(mapping.tp_size, dim=mapping.axis)))
    if isinstance(mapping, ColumnPartsMapping):
        return mapping.join(list(weight.chunk(mapping.tp_size, dim=1)))
    return {str(mapping.hf_param): weight}
