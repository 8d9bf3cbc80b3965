"""Run as a program: trains a small model in Bridge's loop.

python mixed_training.py LAYERS FOLDER [OVERRIDE ...]
"""

import sys

from megalodon_mcore import cpu
from megalodon_mcore.pretraining import prepare_megatron, stand_alone_environment

if __name__ == "__main__":
    cpu.install()
    prepare_megatron()
    stand_alone_environment()
    from megatron.core.transformer.moe import moe_utils

    # Transformer Engine's product, which the router takes where there is one, needs a GPU.
    moe_utils.te_general_gemm = None
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megalodon_mcore.bridge import MegalodonModelProvider
    from megalodon_mcore.bridge.recipes import RECIPES
    from megalodon_mcore.config import MegalodonConfig

    layers, folder, *layout = sys.argv[1:]
    model = MegalodonConfig(
        num_layers=len(layers),
        hidden_size=64,
        num_heads=2,
        ffn_hidden_size=96,
        chunk_size=16,
        swiglu=True,
        vocab_size=128,
        layers=layers,
        attention_heads=4,
        attention_groups=2,
        attention_positions="rope",
        num_experts=4,
        shared_expert_size=48,
    )
    cfg = RECIPES["tiny"]()
    cfg.model = MegalodonModelProvider.of(model, seq_length=64)
    for override in layout:
        name, _, value = override.partition("=")
        setattr(cfg.model, name, int(value))
    cfg.logger.tensorboard_dir = folder
    cfg.checkpoint.save = cfg.checkpoint.load = None
    pretrain(cfg, forward_step)
