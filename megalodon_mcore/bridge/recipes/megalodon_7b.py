"""The paper's 7B at 4K and 32K tokens."""

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config


def megalodon_7b_4k_pretrain_config() -> ConfigContainer:
    """The 7B on sequences of 4,096 tokens, one chunk each; TP 2.

    On one rank weights and gradients alone would take 41 GiB, and one sequence makes it 67.4. TP 2
    inside a node halves them and leaves room for two sequences at once: 49.7 GiB of 80 on 64 GPUs.
    """
    return paper_config("7b-paper", 4096, tp=2, micro_batch_size=2)


def megalodon_7b_32k_pretrain_config() -> ConfigContainer:
    """The paper's own run: the 7B on sequences of 32,768 tokens; TP 2, CP 4.

    TP 2 for the weights' sake (see the 4K recipe). Then CP until activations fit, since it sends
    the fewest bytes: a quarter of a sequence on each rank, in two parts of one chunk, makes it
    50.0 GiB of 80 on 64 GPUs. CP 2 would take 78 GiB, or 54.6 with recomputation.
    """
    return paper_config("7b-paper", 32_768, tp=2, cp=4)
