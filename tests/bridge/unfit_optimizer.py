"""Run as a program: prints how Bridge's loop, called as its users do, refuses an optimizer."""

from megalodon_mcore import cpu
from megalodon_mcore.pretraining import prepare_megatron, stand_alone_environment

if __name__ == "__main__":
    cpu.install()
    prepare_megatron()
    stand_alone_environment()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megalodon_mcore.bridge.recipes import RECIPES

    cfg = RECIPES["tiny"]()
    cfg.optimizer.optimizer = "adaptive_muon"
    try:
        pretrain(cfg, forward_step)
    except ValueError as error:
        print(error)
