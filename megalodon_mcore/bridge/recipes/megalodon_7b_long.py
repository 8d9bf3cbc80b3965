"""The paper's 7B at 256K and 1M tokens.

The paper trains at 32K and reads up to 2M; these go on with the length in training. To continue
from a 32K checkpoint, set `checkpoint.pretrained_checkpoint` and a lower `optimizer.lr`.
"""

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.paper import paper_config


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
