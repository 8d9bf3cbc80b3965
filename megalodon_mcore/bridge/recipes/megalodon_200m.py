"""The 200M at 4K and 32K tokens."""

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
