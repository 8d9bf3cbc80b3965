"""The 200M, the 1.3B and the paper's 7B on sequences of 4K to 1M tokens.

The paper trains its 7B at 32K and reads up to 2M; 256K and 1M go on with the length in training. To
continue from a 32K checkpoint, set `checkpoint.pretrained_checkpoint` and a lower `optimizer.lr`.
"""

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config


def megalodon_200m_4k_pretrain_config() -> ConfigContainer:
    """The 200M on sequences of 4,096 tokens; data-parallel alone.

    Eight sequences at once fill a rank with as many tokens as one of 32K: 23.0 GiB of 80 on 8 GPUs.
    The model fits anywhere; more ranks only add data parallelism, up to 128 (1,024
    sequences a batch). The paper has no such model: batch and length of training are its 7B's, and
    far more than a model of this size needs (`train.train_iters`).
    """
    return paper_config("200m", 4096, micro_batch_size=8)


def megalodon_200m_32k_pretrain_config() -> ConfigContainer:
    """The 200M on sequences of 32,768 tokens; data-parallel alone.

    One sequence at once: 23.0 GiB of 80 on 8 GPUs, for activations grow with tokens and
    not with length. Up to 128 ranks, one for each sequence of a batch; more take
    `model.context_parallel_size`.
    """
    return paper_config("200m", 32_768)


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


def megalodon_7b_256k_pretrain_config() -> ConfigContainer:
    """The 7B on sequences of 262,144 tokens; TP 4, CP 16.

    16K tokens on each context-parallel rank, in two parts of two chunks. TP 4 rather than 2, which
    would need CP 32 to fit, on as many ranks for a sequence: 45.7 GiB of 80 on 64 GPUs.
    A batch has 16 sequences, so up to 1,024 ranks.
    """
    return paper_config("7b-paper", 262_144, tp=4, cp=16)


def megalodon_7b_1m_pretrain_config() -> ConfigContainer:
    """The 7B on sequences of 1,048,576 tokens; TP 8, CP 32, selective recomputation.

    32K tokens on each context-parallel rank, in two parts of four chunks. Attention and FFN are
    computed again in backward: 40.4 GiB of 80 on 256 GPUs, 52.4 without. A batch has 4
    sequences, too few to fill a pipeline; 1,024 ranks take DP 4 or CP 128.
    """
    return paper_config("7b-paper", 1_048_576, tp=8, cp=32, selective_recompute=True)
