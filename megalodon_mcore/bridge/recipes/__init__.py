"""Training recipes in Bridge's form: functions that return a ConfigContainer.

Each can be changed before it is run: `cfg.train.train_iters = 1000`, or on the command line,
`megalodon-mcore pretrain-recipe 7b-32k train.train_iters=1000`.
"""

from collections.abc import Callable

from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.bridge.recipes.finetuning import finetune_config
from megalodon_mcore.bridge.recipes.megalodon_hybrid import (
    megalodon_1_3b_hybrid_32k_pretrain_config,
)
from megalodon_mcore.bridge.recipes.megalodon_moe import megalodon_7b_a1b_4k_pretrain_config
from megalodon_mcore.bridge.recipes.megalodon_tiny import megalodon_tiny_pretrain_config
from megalodon_mcore.bridge.recipes.paper_sizes import (
    megalodon_1_3b_4k_pretrain_config,
    megalodon_1_3b_32k_pretrain_config,
    megalodon_7b_1m_pretrain_config,
    megalodon_7b_4k_pretrain_config,
    megalodon_7b_32k_pretrain_config,
    megalodon_7b_256k_pretrain_config,
    megalodon_200m_4k_pretrain_config,
    megalodon_200m_32k_pretrain_config,
)

RECIPES: dict[str, Callable[[], ConfigContainer]] = {
    "tiny": megalodon_tiny_pretrain_config,
    "200m-4k": megalodon_200m_4k_pretrain_config,
    "200m-32k": megalodon_200m_32k_pretrain_config,
    "1.3b-4k": megalodon_1_3b_4k_pretrain_config,
    "1.3b-32k": megalodon_1_3b_32k_pretrain_config,
    "7b-4k": megalodon_7b_4k_pretrain_config,
    "7b-32k": megalodon_7b_32k_pretrain_config,
    "7b-256k": megalodon_7b_256k_pretrain_config,
    "7b-1m": megalodon_7b_1m_pretrain_config,
    "1.3b-hybrid-32k": megalodon_1_3b_hybrid_32k_pretrain_config,
    "7b-a1b-4k": megalodon_7b_a1b_4k_pretrain_config,
}
"""By the names that the command line knows."""

__all__ = ["RECIPES", "finetune_config", *(recipe.__name__ for recipe in RECIPES.values())]
