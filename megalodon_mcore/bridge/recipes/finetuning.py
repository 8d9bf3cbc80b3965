"""Any pretraining recipe made into one of supervised fine-tuning."""

from __future__ import annotations

import math
from pathlib import Path

from megatron.bridge.data.builders import (
    GPTSFTDatasetConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from megatron.bridge.data.packing.config import PackedSequenceSpecs
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import ConfigContainer

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.parameters import linear_modules

BATCH = 128
"""Sequences in a batch, or the pretraining recipe's if those are fewer."""


def finetune_config(
    pretraining: ConfigContainer,
    pretrained: str | Path,
    data: str | Path,
    packed: bool = False,
    lora_rank: int | None = None,
) -> ConfigContainer:
    """Fine-tunes what a recipe pretrains, with its model and layout.

    The paper fine-tunes nothing with published numbers: rate (5e-6, to zero), warm-up (50 batches),
    length (1,000 batches) and batch are those of Bridge's own recipes of full fine-tuning.

    Sequences are padded to the recipe's length, so that every layout can cut them.

    Args:
        pretraining: the recipe, changed in place.
        pretrained: a Hugging Face folder of the same model, with its tokenizer.
        data: a folder with training.jsonl, validation.jsonl and test.jsonl of objects that have
            "input" and "output".
        packed: whether sequences hold as many of those as they have room for, each of which gives
            what it gives alone; micro-batches are one sequence then.
        lora_rank: trains low-rank adapters of the linear layers alone, of this rank, at the rate
            of Bridge's own recipes (1e-4).
    """
    cfg = pretraining
    cfg.checkpoint.pretrained_checkpoint = str(pretrained)
    cfg.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    cfg.tokenizer.tokenizer_model = str(pretrained)
    cfg.tokenizer.vocab_size = None
    cfg.model.vocab_size = None
    cfg.dataset = GPTSFTDatasetConfig(
        seq_length=cfg.model.seq_length,
        dataset_root=str(data),
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator=" "
        ),
        dataset_kwargs={"pad_to_max_length": True},
        num_workers=cfg.dataset.num_workers,
        persistent_workers=False,
        do_test=False,
    )
    if packed:
        cfg.dataset.enable_offline_packing = True
        cfg.dataset.offline_packing_specs = PackedSequenceSpecs(
            packed_sequence_size=cfg.model.seq_length
        )
        cfg.train.micro_batch_size = 1
    # Ranks of one sequence may have different numbers of tokens that count.
    cfg.model.calculate_per_token_loss = True
    cfg.ddp.average_in_collective = False

    cfg.train.global_batch_size = min(cfg.train.global_batch_size, BATCH)
    cfg.train.train_iters = min(cfg.train.train_iters, 1000)
    cfg.optimizer.lr, cfg.optimizer.min_lr = 5e-6, 0.0
    if lora_rank is not None:
        cfg.peft = adapters_of(cfg.model.config(), lora_rank)
        cfg.optimizer.lr = 1e-4
    cfg.scheduler.lr_warmup_iters = min(cfg.scheduler.lr_warmup_iters, 50)
    cfg.validation.eval_interval = min(cfg.validation.eval_interval, 100)
    cfg.checkpoint.save_interval = min(cfg.checkpoint.save_interval, 100)
    return cfg


def adapters_of(config: MegalodonConfig, rank: int) -> LoRA:
    """Adapters of every linear layer of a model."""
    modules = {z for symbol in set(config.symbols) for z in linear_modules(config, symbol)}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return LoRA(target_modules=targets, dim=rank, alpha=rank)


def pad_packed_examples(cfg: ConfigContainer) -> None:
    """Makes every packed example as long as the layout, once it is known, can cut it."""
    specs = getattr(cfg.dataset, "offline_packing_specs", None)
    if specs is not None and cfg.model.context_parallel_size > 1:
        specs.pad_seq_to_mult = math.lcm(
            specs.pad_seq_to_mult or 1, 2 * cfg.model.context_parallel_size
        )
