"""A Megalodon block whose states lie in vLLM's pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from megalodon_mcore.hf.block_megalodon import (
    ComplexEMA,
    LayerNorm,
    QueryKey,
    RMSNorm,
    TimestepNorm,
)
from megalodon_mcore.hf.layers_megalodon import Place
from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.kernels.chunked_attention import AttentionState, chunked_attention
from megalodon_mcore.kernels.gates import gated_silu
from megalodon_mcore.kernels.paged_attention import paged_attention
from megalodon_mcore.kernels.query_key import query_key
from megalodon_mcore.kernels.timestep_norm import TimestepNormState, timestep_norm
from megalodon_mcore.serving.batch import Batch, Decoding, Pieces
from megalodon_mcore.serving.beside import (
    ExpertsOfBlock,
    FeedForward,
    experts_of,
    loader_of_part,
    mixture,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from megalodon_mcore.hf import MegalodonConfig

# A block's own TimestepNorm's place in a page, and the final one's, which is used in one block's.
OWN, FINAL = 0, 1


def state_shapes(config: MegalodonConfig, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Of a page: mean, var, CEMA's h as pairs, keys and values of a chunk.

    Ranks share heads; where they are more, some share the columns of a head's values.
    """
    heads, groups = config.num_attention_heads, config.norm_num_groups
    own = max(1, heads // ranks)
    keys = own, config.chunk_size, config.z_dim // heads
    values = own, config.chunk_size, config.value_dim // ranks // own
    return (2, groups), (2, groups), (config.hidden_size, config.cema_ndim, 2), keys, values


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of those, for a model of this type; means are wide, since a step moves them by its share."""
    return torch.float64, torch.float64, torch.float32, dtype, dtype


def columns_of_heads(config: MegalodonConfig, rank: int, ranks: int) -> slice:
    """A rank's of the z_dim columns: those of its heads, or of the one that it shares."""
    heads = config.num_attention_heads
    width, first = config.z_dim // heads, rank * heads // ranks
    return slice(first * width, (first + max(1, heads // ranks)) * width)


class PagedTimestepNorm(TimestepNorm):
    """TimestepNorm of a batch's requests."""

    def forward(self, x: Tensor, batch: Batch, mean: Tensor, var: Tensor) -> Tensor:
        """[steps, D] to the same; pages' mean and var [pages, G] become those after it."""

        def step(rows: Decoding, x: Tensor) -> Tensor:
            state = {"mean": rows.read(mean), "var": rows.read(var)}
            y = super(PagedTimestepNorm, self).forward(x[:, None], rows.span, state)
            mean[rows.pages], var[rows.pages] = state["mean"], state["var"]
            return y[:, 0]

        return batch.apart(step, lambda rows, x: self._piece(rows, x, mean, var), x)

    def _piece(self, rows: Pieces, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        table, row = rows.segments, x[:, None]
        held_mean, held_var = mean[rows.pages], var[rows.pages]
        state = TimestepNormState(held_mean, held_var)
        y, _ = timestep_norm(row, self.weight, self.bias, self.num_groups, self.eps, table, state)
        after = self.statistics_after(row, table, held_mean, held_var)
        mean[rows.pages], var[rows.pages] = after
        return y[:, 0]


class PagedCEMA(ComplexEMA):
    """The complex exponential moving average of a batch's requests."""

    step_weights: tuple[Tensor, ...] | None = None
    """What a step takes from the parameters, once they are loaded."""

    @torch.inference_mode()
    def renew(self) -> None:
        """After parameters changed: in place, since CUDA graphs read it where it is."""
        if self.step_weights is not None:
            for held, new in zip(self.step_weights, self._step_weights(), strict=True):
                held.copy_(new)

    def forward(self, x: Tensor, batch: Batch, averages: Tensor) -> Tensor:
        """[steps, D] to the same; pages' h [pages, D, N, 2] become those after it."""

        def step(rows: Decoding, x: Tensor) -> Tensor:
            if self.step_weights is None:
                self.step_weights = self._step_weights()
            state = {"cema": rows.read(averages), "step": self.step_weights}
            y = super(PagedCEMA, self).forward(x[:, None], rows.span, state)
            averages[rows.pages] = state["cema"]
            return y[:, 0]

        def piece(rows: Pieces, x: Tensor) -> Tensor:
            weights = (self.alpha, self.delta, self.theta, self.gamma, self.omega)
            before = torch.view_as_complex(averages[rows.pages])
            y, after = cema(x[:, None], *weights, rows.segments, before, return_state=True)
            averages[rows.pages] = torch.view_as_real(after)
            return y[:, 0]

        return batch.apart(step, piece, x)


class PagedAttention(QueryKey):
    """Attention inside chunks of a rank's heads, and the parameters of their queries and keys."""

    def __init__(self, config: MegalodonConfig, own: slice) -> None:
        """`own` are the rank's of the z_dim columns."""
        super().__init__(config)
        columns = own.stop - own.start
        self.num_heads = self.num_heads * columns // config.z_dim
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.zeros(2, columns, dtype=torch.float32))
            parameter.weight_loader = loader_of_part(lambda given: given[:, own])
            setattr(self, name, parameter)

    def forward(self, z: Tensor, v: Tensor, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        """[steps, Z and E of the rank] to [steps, E]; pages' keys and values get the steps'."""

        def step(rows: Decoding, z: Tensor, v: Tensor) -> Tensor:
            q, k = super(PagedAttention, self).forward(z[:, None], rows.span)
            slots = rows.span.seen % self.chunk_size
            keys[rows.pages, :, slots] = k[:, 0]
            values[rows.pages, :, slots] = v.unflatten(-1, (self.num_heads, -1))
            out = paged_attention(q[:, 0], keys, values, rows.pages, slots + 1, rows.room)
            return out.flatten(1)

        def piece(rows: Pieces, z: Tensor, v: Tensor) -> Tensor:
            z, v = (x[:, None].unflatten(-1, (self.num_heads, -1)) for x in (z, v))
            arguments = (self.weight, self.bias, self.eps, *self.rotation, rows.segments)
            q, k = query_key(z, *arguments)
            (pages, slots), (into, places) = rows.before, rows.after
            before = AttentionState(keys[pages, :, slots], values[pages, :, slots])
            out, _ = chunked_attention(q, k, v, self.chunk_size, rows.segments, before)
            keys[into, :, places], values[into, :, places] = k[rows.steps, 0], v[rows.steps, 0]
            return out[:, 0].flatten(1)

        return batch.apart(step, piece, z, v)

    @property
    def chunk_size(self) -> int:
        """Positions in a chunk."""
        return self.rotation[1]


class MegalodonBlock(nn.Module, MambaBase):
    """One block; its parameters have the names of the export."""

    def __init__(
        self, vllm_config: VllmConfig, index: int, prefix: str, with_experts: bool = False
    ) -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.dtype, self.prefix = vllm_config.model_config.dtype, prefix
        self.ranks = get_tensor_model_parallel_world_size()
        width, rank = config.hidden_size, get_tensor_model_parallel_rank()

        def columns(name: str, out: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(width, out, prefix=f"{prefix}.{name}")

        self.timestep_norm = PagedTimestepNorm(config)
        self.cema = PagedCEMA(config)
        self.cema_norm = RMSNorm(config)
        own = columns_of_heads(config, rank, self.ranks)
        self.wz = ReplicatedLinear(width, own.stop - own.start, prefix=f"{prefix}.wz")
        for parameter in self.wz.parameters():
            parameter.weight_loader = loader_of_part(lambda given: given[own])
        self.query_key = PagedAttention(config, own)
        self.wv = columns("wv", config.value_dim)
        self.wr = columns("wr", config.value_dim)
        # Both halves of one product, whose parts the ranks sum up once.
        part = {"reduce_results": False, "skip_bias_add": True}
        self.wh1 = RowParallelLinear(
            width, width, input_is_parallel=False, prefix=f"{prefix}.wh1", **part
        )
        self.wh2 = RowParallelLinear(
            config.value_dim, width, bias=False, prefix=f"{prefix}.wh2", **part
        )
        self.ffn_norm = LayerNorm(config)
        self.experts = self.shared_expert = None
        if with_experts:
            self.ffn = ExpertsOfBlock(config, index)
            self.experts, self.shared_expert = experts_of(config)
        else:
            self.ffn = FeedForward(config, f"{prefix}.ffn", index)

        vllm_config.compilation_config.static_forward_context[prefix] = self
        # A page for nobody, until vLLM binds all of them.
        pages = zip(self.get_state_shape(), self.get_state_dtype(), strict=True)
        self.kv_cache = tuple(torch.zeros(1, *shape, dtype=dtype) for shape, dtype in pages)

    mamba_type = MambaAttentionBackendEnum["MEGALODON"]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors in a page."""
        return state_shapes(self.config, self.ranks)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Of the tensors in a page."""
        return state_dtypes(self.dtype)

    def batch(self, x: Tensor) -> Batch:
        """The requests that x [steps, D] is of."""
        # vLLM tries models, and tunes kernels, with batches that leave layers with states out.
        batch = (get_forward_context().attn_metadata or {}).get(self.prefix)
        return Batch.of_nobody(self.config, x) if batch is None else batch

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """[steps, D] to the same; updates the pages, of which a batch says more than a place."""
        batch, (mean, var, averages, keys, values) = self.batch(x), self.kv_cache
        t = self.timestep_norm(x, batch, mean[:, OWN], var[:, OWN])
        m = self.cema_norm(self.cema(t, batch, averages))
        v = F.silu(self.wv(t)[0])
        a = self.query_key(self.wz(m)[0], v, batch, keys, values)
        gated = gated_silu(self.wr(m)[0], a)
        update, bias = self.wh1(m)
        update = update + self.wh2(gated)[0]
        if self.ranks > 1:
            update = tensor_model_parallel_all_reduce(update)
        # vLLM's product for bfloat16 on a CPU keeps biases in float32.
        u = self.ffn_norm(x + (update + bias.to(update.dtype)))
        if self.experts is None:
            return x + self.ffn(u)
        output = mixture(self, u)
        return x + (output if self.ffn.rescale is None else self.ffn.rescale(output))
