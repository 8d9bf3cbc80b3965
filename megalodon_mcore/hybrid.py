"""Megalodon in Megatron's HybridModel: a stack for `--hybrid-layer-pattern`.

Of a pattern such as `MM*M`, `M` is a whole Megalodon block, `*` attention over whole documents,
`-` an MLP and `E` a mixture of experts, the last three Megatron's own layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megalodon_mcore.config import BLOCKS
from megalodon_mcore.layers.attention_layer import AttentionLayer, DocumentAttention
from megalodon_mcore.layers.block import one_row, parameter_device
from megalodon_mcore.layers.norms import LayerNorm, RMSNorm
from megalodon_mcore.layers.prediction import prediction_spec
from megalodon_mcore.parallel.shared_parameters import mark_sequence_parallel

if TYPE_CHECKING:
    from megalodon_mcore.spec import Parts


class MegalodonStack(HybridStack):
    """Layers of a pattern's stage and, on the last one, the model's final TimestepNorm."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        parts: Parts,
        is_uniform: bool,
        pg_collection: ProcessGroupCollection,
        post_process: bool = True,
        **rest: Any,
    ) -> None:
        """Megatron's arguments of a stack, but for:

        parts: what the layers are made from.
        is_uniform: whether all of the model's are blocks of one kind, which a GPTModel's checkpoint
            has side by side.
        """
        super().__init__(
            config,
            submodules,
            pg_collection=pg_collection,
            post_process=post_process,
            **rest | {"post_layer_norm": False},
        )
        self.parallel = parts.parallel(config, pg_collection)
        self.is_uniform = is_uniform
        megalodon = parts.layer.params["megalodon"]
        # A block that is the model's first layer does it itself.
        scales = megalodon.scale_embedding and megalodon.symbols[0] not in BLOCKS
        self.embedding_scale = (
            math.sqrt(config.hidden_size) if scales and self.pre_process else None
        )
        self.final_layernorm = None
        if post_process:
            self.final_layernorm = parts.final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As HybridStack; packed rows are one, but between stages of a pipeline.

        Raises:
            ValueError: impossible bounds of documents, or an inference context.
        """
        documents = self.parallel.documents
        documents.set(kwargs.get("packed_seq_params"), self.parallel.cp_group)
        rows = None
        if documents.packed:
            given = hidden_states if self.pre_process else self.input_tensor
            rows = self.parallel.rows(given)
            if self.pre_process:
                hidden_states = one_row(given)
            else:
                self.input_tensor = one_row(given)
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        # As TransformerBlock does, and the blocks expect: ranks have different positions.
        random = get_cuda_rng_tracker().fork() if self.parallel.sequence_parallel else nullcontext()
        with random:
            hidden_states = super().forward(hidden_states, *args, **kwargs)
        if self.final_layernorm is not None:
            return self.final_layernorm(hidden_states)
        if rows is not None:
            # Of a view Megatron could not free the memory.
            hidden_states = make_viewless_tensor(
                inp=hidden_states.reshape(-1, rows, hidden_states.shape[-1]),
                requires_grad=hidden_states.requires_grad,
                keep_graph=True,
            )
        return hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Entries of a checkpoint; where all layers are alike, those that a GPTModel's has."""
        whole = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apart = {"non_homogeneous_layers", "singleton_local_shards"}
        if not self.is_uniform or any((metadata or {}).get(name) for name in apart):
            return whole
        layers = f"{prefix}layers."
        found = {name: entry for name, entry in whole.items() if not name.startswith(layers)}
        for place, layer in enumerate(self.layers):
            here = f"{layers}{place}."
            offset = (0, layer.layer_number - 1, self.config.num_layers)
            entries = layer.sharded_state_dict(here, (offset,), metadata)
            replace_prefix_for_sharding(entries, here, layers)
            found |= entries
        return found


def stack_of(parts: Parts, config: TransformerConfig) -> ModuleSpec:
    """What HybridModel builds its stack from, once its constructor's arguments are known."""
    symbols = parts.layer.params["megalodon"].symbols
    is_uniform = config.moe_layer_freq == 1 and symbols in [z * len(symbols) for z in BLOCKS]
    return ModuleSpec(
        module=MegalodonStack,
        params={"parts": parts, "is_uniform": is_uniform},
        submodules=dataclasses.replace(
            stack_submodules(config, parts), mtp_block_spec=prediction_of(parts, config)
        ),
    )


def prediction_of(
    parts: Parts, config: TransformerConfig
) -> MultiTokenPredictionBlockSubmodules | None:
    """What predicts tokens beyond the next one, in models that do."""
    if not config.mtp_num_layers:
        return None
    stack, linear = stack_submodules(config, parts), parts.backend.column_parallel_linear()
    return prediction_spec(config.mtp_num_layers, stack, layer_norm, linear)


def stack_submodules(config: TransformerConfig, parts: Parts) -> HybridStackSubmodules:
    """The layers by symbol; those that no pattern here may have are left out."""
    backend, add = parts.backend, get_bias_dropout_add
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=DocumentAttention,
            linear_proj=backend.row_parallel_linear(),
        ),
    )
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
            activation_func=backend.activation_func(),
        ),
    )
    found = {
        "mamba_layer": ModuleSpec(
            module=parts.layer.module,
            params=parts.layer.params | {"add_layer_offset": False, "divides_rows": False},
            submodules=parts.layer.submodules,
        ),
        "attention_layer": ModuleSpec(
            module=AttentionLayer,
            params=parts.attention,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer_norm, self_attention=attention, self_attn_bda=add
            ),
        ),
        "mlp_layer": ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer_norm, mlp=mlp, mlp_bda=add
            ),
        ),
    }
    if (experts := parts.layer.submodules.experts) is not None:
        found["moe_layer"] = ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer_norm, mlp=experts, mlp_bda=add
            ),
        )
    return HybridStackSubmodules(**found)


def layer_norm(config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> nn.Module:
    """What --normalization names, ours: torch's norms know no sequence parallelism."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    made = norm(hidden_size, eps, parameter_device(config))
    if config.sequence_parallel:
        mark_sequence_parallel(made)
    return made


def check_pattern(pattern: str, num_experts: int | None, depths: int | None = None) -> None:
    """Checks the symbols of a --hybrid-layer-pattern, beside --num-experts and --mtp-num-layers.

    Raises:
        ValueError: one sentence names the symbol and what would work.
    """
    main, *predicting = pattern.split("/")
    for part in (main, *predicting):
        for symbol in part:
            if symbol == "|" and part is not main:
                raise ValueError(
                    f"--hybrid-layer-pattern is {pattern}, with a | after /; layers that predict "
                    "further tokens are all on the last pipeline stage, so take it out."
                )
            if symbol not in "M*-E|":
                raise ValueError(
                    f"--hybrid-layer-pattern has {symbol!r}; with Megalodon it takes M (a block), "
                    "* (attention), - (MLP), E (experts), | between pipeline stages and, after all "
                    "of these, / before the layers that predict a further token."
                )
    if predicting and (not predicting[0] or len(set(predicting)) > 1):
        raise ValueError(
            f"--hybrid-layer-pattern is {pattern}, in which the layers after each / differ or are "
            "none; give every one the same, as in MM/M/M."
        )
    for symbol in "".join(predicting):
        if symbol not in main:
            raise ValueError(
                f"--hybrid-layer-pattern is {pattern}, which has {symbol} after / alone; put one "
                "before it, too, or leave it out."
            )
    if depths is not None and depths != len(predicting):
        raise ValueError(
            f"--mtp-num-layers is {depths}, and --hybrid-layer-pattern {pattern} has "
            f"{len(predicting)} of / and the layers that predict a further token; leave the number "
            "out and say it in the pattern, as in MM/M."
        )
    if not all(main.split("|")):
        raise ValueError(
            f"--hybrid-layer-pattern is {pattern!r}, in which a pipeline stage has no layer; give "
            "each one, as in MM|*M."
        )
    if "M" not in main:
        raise ValueError(
            f"--hybrid-layer-pattern is {pattern}, which has no Megalodon block (M); take one in."
        )
    if "E" in pattern and not num_experts:
        raise ValueError("--hybrid-layer-pattern has E, so it needs --num-experts.")
