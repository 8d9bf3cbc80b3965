"""Small Hugging Face models of several kinds of layers."""

import torch

from hf.hf_models import random_model
from megalodon_mcore.hf import layers_megalodon

ATTENTION = dict(
    attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attention_positions="rope",
    partial_rotary_factor=0.7,
)
EXPERTS = dict(
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=12,
    shared_expert_gate=True,
    router_score="sigmoid",
    router_bias=True,
    router_scaling=2.5,
)
MIXED = {
    "M*ME": ATTENTION | EXPERTS,
    "*M-": ATTENTION | dict(linear_bias=True, normalization="RMSNorm"),
    "MX*": dict(num_experts=4, rescale_nffn=True),
}


def build_mixed(symbols="M*ME", **changes):
    """A model of one of MIXED or of other layers, every parameter off its start."""
    values = dict(num_attention_heads=2, chunk_size=8, swiglu=True, layer_symbols=symbols)
    values |= MIXED.get(symbols, {}) | changes
    model = random_model(num_hidden_layers=len(symbols), **values)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, layers_megalodon.Experts):
                # Scores far enough apart that rounding chooses no other expert.
                module.router.weight.mul_(8)
    return model
