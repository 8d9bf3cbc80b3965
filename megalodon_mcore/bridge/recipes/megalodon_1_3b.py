"""The 1.3B at 4K and 32K tokens."""

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config


def megalodon_1_3b_4k_pretrain_config() -> ConfigContainer:
    """The 1.3B on sequences of 4,096 tokens; data-parallel alone.

    Weights and gradients take 7.5 GiB, so all the rest is activations: four sequences at once make
    it 45.9 GiB of 80 on 8 GPUs, eight would not fit. Up to 256 ranks.
    """
    return paper_config("1.3b", 4096, micro_batch_size=4)


def megalodon_1_3b_32k_pretrain_config() -> ConfigContainer:
    """The 1.3B on sequences of 32,768 tokens; CP 2.

    A whole sequence on one rank would take 82 GiB. Two ranks with half of it each take 46.1 GiB of
    80 on 8 GPUs and exchange states alone: halves of halves (zigzag) are whole chunks.
    """
    return paper_config("1.3b", 32_768, cp=2)
