"""Builds the model of a Megatron checkpoint in a single process, with its tokenizer."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalodon_mcore import checkpoint_errors, cpu, pretraining
from megalodon_mcore.conversion.mcore_checkpoint import TRACKER, checkpoint_folder
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader


@dataclass
class LoadedModel:
    """A model in evaluation mode, its Megatron tokenizer and the arguments it was trained with."""

    model: torch.nn.Module
    tokenizer: Any
    arguments: Namespace
    iteration: int


def load_model(
    checkpoint: Path,
    iteration: int | None = None,
    arguments: tuple[str, ...] = (),
    tokenizer: Path | None = None,
) -> LoadedModel:
    """Loads a torch_dist checkpoint written by any parallel layout.

    Args:
        checkpoint: the folder that training had as --save.
        iteration: which of its checkpoints; the last one by default.
        arguments: more of Megatron's, beside those of the checkpoint.
        tokenizer: a Hugging Face folder or SentencePiece model to take for the checkpoint's own.

    Raises:
        FileNotFoundError: there is no finished checkpoint in the folder.
        ValueError: `tokenizer` holds none, or the checkpoint is damaged.
    """
    if not (checkpoint / TRACKER).is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no finished checkpoint; give the folder that training had as "
            "--save."
        )
    place = checkpoint_folder(checkpoint, iteration)
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is missing.")
    if tokenizer is not None:
        arguments = (*arguments, *_tokenizer_arguments(tokenizer))
    if not torch.distributed.is_initialized():
        cpu.install()
        pretraining.prepare_megatron()
        pretraining.stand_alone_environment()

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    with checkpoint_errors.in_one_sentence(place):
        if not any(place.glob("mp_rank_*")):
            # Where its metadata is damaged, torch prints tracebacks, or runs what a pickle says.
            TorchDistReader(place)
        parsed = _parse_arguments(checkpoint, iteration, arguments)
        initialize_megatron()
        model_config = gpt_config_from_args(parsed)
        models = GPTModelBuilder(model_config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        loaded_iteration, _ = load_checkpoint(models, None, None)
        built = build_tokenizer(parsed)
    model = models[0]
    while hasattr(model, "module"):
        model = model.module
    return LoadedModel(model.eval(), built, parsed, loaded_iteration)


def _tokenizer_arguments(place: Path) -> tuple[str, ...]:
    from megalodon_mcore.conversion.tokenizers import open_tokenizer

    found = open_tokenizer(place) if place.exists() else None
    if found is None:
        raise ValueError(
            f"--tokenizer is {place}, which holds no tokenizer; it takes a Hugging Face folder or "
            "a SentencePiece model."
        )
    return ("--tokenizer-type", found.kind, "--tokenizer-model", str(place))


def _parse_arguments(
    checkpoint: Path, iteration: int | None, arguments: tuple[str, ...]
) -> Namespace:
    """Megatron's arguments for one process, all of the model's from the checkpoint."""
    command_line = [
        *("--load", str(checkpoint), "--use-checkpoint-args"),
        *("--micro-batch-size", "1", "--exit-on-missing-checkpoint"),
        *("--no-load-optim", "--no-load-rng"),
        *arguments,
    ]
    if iteration is not None:
        command_line += ["--ckpt-step", str(iteration)]
    original = sys.argv
    sys.argv = [original[0], *command_line]
    try:
        return pretraining.parse_arguments(
            from_checkpoint=("bf16", "fp16", "vocab_size", "layernorm_epsilon"),
            tokenizer_option="--tokenizer",
        )
    finally:
        sys.argv = original
