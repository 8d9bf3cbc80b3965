"""What stands beside blocks, or in their place for an FFN: attention, MLPs and experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from megalodon_mcore.hf.block_megalodon import LayerNorm, Rescale, RMSNorm
from megalodon_mcore.hf.layers_megalodon import (
    Experts,
    Place,
    SharedExpert,
    make_place,
    rotate_halves,
)
from megalodon_mcore.hf.layers_megalodon import experts_of as experts_of_config
from megalodon_mcore.hf.layers_megalodon import mixture as mixture_of
from megalodon_mcore.kernels.gates import gated_silu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from megalodon_mcore.hf import MegalodonConfig


class FeedForward(nn.Module):
    """(silu(u W1) * (u W3)) W2, or silu(u W1) W2 without SwiGLU, its columns shared by ranks.

    An MLP (`-`) has biases where the model has; a block's FFN has none but may have a factor.
    """

    def __init__(self, config: MegalodonConfig, prefix: str, index: int | None = None) -> None:
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        bias = index is None and config.linear_bias

        def columns(name: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(*sizes, bias=bias, prefix=f"{prefix}.{name}")

        self.w1, self.w3 = columns("w1"), columns("w3") if config.swiglu else None
        self.w2 = RowParallelLinear(*sizes[::-1], bias=bias, prefix=f"{prefix}.w2")
        own = index is not None and config.rescale_nffn
        self.rescale = Rescale(config, index) if own else None

    def forward(self, u: Tensor) -> Tensor:
        """[steps, D] to the same."""
        hidden = self.w1(u)[0]
        hidden = F.silu(hidden) if self.w3 is None else gated_silu(hidden, self.w3(u)[0])
        output = self.w2(hidden)[0]
        return output if self.rescale is None else self.rescale(output)


class ExpertsOfBlock(nn.Module):
    """A block's factor where its FFN is made of experts, which stand in the block itself."""

    def __init__(self, config: MegalodonConfig, index: int) -> None:
        super().__init__()
        self.rescale = Rescale(config, index) if config.rescale_nffn else None


def loader_of_part(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    """What vLLM calls to load a rank's part of a weight; it knows the arguments by these names."""

    def load(param: Tensor, loaded_weight: Tensor) -> None:
        own = part(loaded_weight)
        # copy_ would spread a smaller one out.
        assert own.shape == param.shape
        param.data.copy_(own)

    return load


HIDDEN_AXIS = {"w1": -2, "w3": -2, "w2": -1}
"""Of experts' weights: the axis of their hidden columns, which ranks share."""


def experts_of(config: MegalodonConfig) -> tuple[Experts, SharedExpert | None]:
    """A rank's columns of a layer's experts, and of the one for every token where there is one."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    own = copy.copy(config)
    own.moe_intermediate_size = (config.moe_intermediate_size or 0) // ranks
    own.shared_expert_intermediate_size = (config.shared_expert_intermediate_size or 0) // ranks
    experts, shared = experts_of_config(own)
    for module in (experts, shared) if shared else (experts,):
        for name, parameter in module.named_parameters():
            axis = HIDDEN_AXIS.get(name.partition(".")[0])
            if axis is not None:
                parameter.weight_loader = loader_of_part(
                    lambda given, axis=axis: given.tensor_split(ranks, axis)[rank]
                )
    return experts, shared


def mixture(layer: nn.Module, u: Tensor) -> Tensor:
    """A layer's experts of steps [steps, D], whose columns ranks share."""
    output = mixture_of(layer, u[:, None])[:, 0]
    ranks = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(output) if ranks > 1 else output


class DocumentAttention(nn.Module):
    """Causal attention over a request, its keys and values in vLLM's pages; ranks share groups."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, ranks = vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size()
        heads, groups, self.width = (
            config.attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.groups = groups // ranks
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (heads + 2 * groups) * self.width,
            bias=config.qkv_bias,
            prefix=f"{prefix}.qkv",
        )
        self.proj = RowParallelLinear(
            heads * self.width, config.hidden_size, bias=config.linear_bias, prefix=f"{prefix}.proj"
        )
        self.attend = Attention(
            heads // ranks,
            self.width,
            self.width**-0.5,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attend",
        )

    def forward(self, u: Tensor, place: Place) -> Tensor:
        """[steps, D] to the same."""
        by_group = self.qkv(u)[0].unflatten(-1, (self.groups, -1, self.width))
        q, k, v = by_group[:, :, :-2].flatten(1, 2), by_group[:, :, -2], by_group[:, :, -1]
        q, k = (rotate_halves(z[:, None], place)[:, 0] for z in (q, k))
        return self.proj(self.attend(q.flatten(1), k.flatten(1), v.flatten(1)))[0]


class PlainLayer(nn.Module):
    """x + f(norm(x)), f attention over the document (`*`), an MLP (`-`) or experts (`E`)."""

    def __init__(self, vllm_config: VllmConfig, symbol: str, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.norm = (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config)
        self.attention = (
            DocumentAttention(vllm_config, f"{prefix}.attention") if symbol == "*" else None
        )
        self.ffn = FeedForward(config, f"{prefix}.ffn") if symbol == "-" else None
        self.experts, self.shared_expert = experts_of(config) if symbol == "E" else (None, None)

    def forward(self, x: Tensor, place: Place | None) -> Tensor:
        """[steps, D] to the same."""
        u = self.norm(x)
        if self.attention is not None:
            return x + self.attention(u, place)
        return x + (mixture(self, u) if self.ffn is None else self.ffn(u))


def place_of(config: MegalodonConfig, positions: Tensor, x: Tensor) -> Place | None:
    """The places of steps x [steps, D] in their requests, int64 [steps]; None if none needs it."""
    if not config.has("*"):
        return None
    return make_place(config, positions, x[:, None], None, None, None)
