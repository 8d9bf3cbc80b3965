"""Blocks with experts: 7B parameters, of which a token meets 1B."""

import dataclasses

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config
from megalodon_mcore.sizes import SIZES

MOE_7B_A1B = dataclasses.replace(
    SIZES["1.3b"],
    num_layers=16,
    layers=16 * "X",
    swiglu=True,
    num_experts=64,
    experts_per_token=4,
    expert_ffn_size=1024,
)


def megalodon_7b_a1b_4k_pretrain_config() -> ConfigContainer:
    """Blocks of the 1.3B's width with 64 experts each, on sequences of 4,096 tokens; EP 8.

    Width, layers, experts and both losses of the router are OLMoE's (arXiv 2409.02060), but for
    four of its eight experts a token: a block's mixer is nearly twice a layer of its attention, and
    so 1.0B of 7.1B parameters are active. No shared expert, as there.

    EP 8, inside a node, for the weights' and gradients' sake: 8 GiB in place of 40. Two sequences
    at once take 36.0 GiB of 80 on 8 GPUs where experts get equally many tokens; four would take
    54.2, but early in training some get far more. Ranks beyond the 8 are data-parallel.
    """
    cfg = paper_config(MOE_7B_A1B, 4096, ep=8, micro_batch_size=2)
    cfg.model.moe_token_dispatcher_type = "alltoall"
    cfg.model.moe_grouped_gemm = True
    cfg.model.moe_router_load_balancing_type = "aux_loss"
    cfg.model.moe_aux_loss_coeff = 1e-2
    cfg.model.moe_z_loss_coeff = 1e-3
    cfg.model.moe_router_dtype = "fp32"
    return cfg
