"""The 1.3B with attention over whole documents in every eighth layer."""

import dataclasses

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config
from megalodon_mcore.sizes import SIZES

HYBRID_1_3B = dataclasses.replace(
    SIZES["1.3b"], layers=3 * "MMMMMMM*", attention_heads=16, attention_groups=4
)


def megalodon_1_3b_hybrid_32k_pretrain_config() -> ConfigContainer:
    """The 1.3B on sequences of 32,768 tokens, 3 of its 24 layers attention; TP 2.

    Blocks carry far positions in averages alone; one layer of attention in eight, Jamba's share
    (arXiv 2403.19887), can look each of them up. It has 16 heads of 128 in 4 groups, so that its
    keys and values take 6 KiB a token of context, and no RoPE, as Jamba's: the blocks tell
    positions.

    TP 2 takes 42.3 GiB of 80 on 8 GPUs. CP 2, as the 1.3B has it without attention, would fit too;
    but parts of a sequence need a mask, 1 GiB a layer, and compute all scores, where whole ones are
    plain causal and compute half.
    """
    return paper_config(HYBRID_1_3B, 32_768, tp=2)
