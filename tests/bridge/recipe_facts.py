"""Run as a program: prints every recipe's numbers as one line of JSON."""

import dataclasses
import json

from megalodon_mcore import cpu

if __name__ == "__main__":
    cpu.install()
    from megalodon_mcore.bridge.recipes import RECIPES

    facts = {}
    for name, recipe in RECIPES.items():
        cfg = recipe()
        model, optimizer, scheduler = cfg.model, cfg.optimizer, cfg.scheduler
        model.finalize()
        facts[name] = {
            "doc": recipe.__doc__,
            "tp": model.tensor_model_parallel_size,
            "cp": model.context_parallel_size,
            "ep": model.expert_model_parallel_size,
            "config": dataclasses.asdict(model.config()),
            "seq_length": model.seq_length,
            "recompute": model.recompute_granularity == "selective",
            "transformer_impl": model.transformer_impl,
            "dropouts": [
                model.hidden_dropout,
                model.attention_dropout,
                model.megalodon_hidden_dropout,
            ],
            "micro_batch_size": cfg.train.micro_batch_size,
            "global_batch_size": cfg.train.global_batch_size,
            "train_iters": cfg.train.train_iters,
            "adam": [optimizer.adam_beta1, optimizer.adam_beta2],
            "weight_decays": [
                optimizer.weight_decay,
                scheduler.start_weight_decay,
                scheduler.end_weight_decay,
            ],
            "lr": optimizer.lr,
            "clip": optimizer.clip_grad,
            "decay": scheduler.lr_decay_style,
            "precision": cfg.mixed_precision,
        }
    print(json.dumps(facts))
