"""Megatron's arguments as a checkpoint keeps them, beside those that are the model's."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megalodon_mcore.checkpoint_tokenizer import MissingTokenizerError, tokenizer_of_checkpoint
from megalodon_mcore.config import BLOCKS, MegalodonConfig, layers_beside_blocks
from megalodon_mcore.conversion.model import OpenModel, Tokenizer
from megalodon_mcore.conversion.tokenizers import (
    NULL_TOKENIZER,
    open_tokenizer,
    tokenizer_vocab_size,
)


def dtype_of(arguments: Namespace) -> torch.dtype:
    """The type of the parameters that do not stay float32."""
    if getattr(arguments, "fp16", False):
        return torch.float16
    return torch.bfloat16 if getattr(arguments, "bf16", False) else torch.float32


def tokenizer_of(
    arguments: Namespace, folder: Path, padded: int, tokenizer: Path | None, vocab_size: int | None
) -> tuple[Tokenizer | None, int]:
    """The tokenizer and the size of the vocabulary without padding.

    Args:
        arguments: the checkpoint's.
        folder: what training had as --save, where its tokenizer may lie.
        padded: rows of the embedding.
        tokenizer: where it is now, if not where it was in training.
        vocab_size: the size, if the caller knows better.

    Raises:
        ValueError: the tokenizer is not where it was, and nothing else says how large it is.
    """
    kind = getattr(arguments, "tokenizer_type", None) or NULL_TOKENIZER
    found, size = None, None
    if kind == NULL_TOKENIZER and tokenizer is None:
        size = getattr(arguments, "vocab_size", None)
        eos = getattr(arguments, "null_tokenizer_eod_id", None)
        if size is not None:
            found = Tokenizer(kind, (), int(size) - 1 if eos is None else int(eos))
    else:
        place = tokenizer
        try:
            if place is None:
                recorded = getattr(arguments, "tokenizer_model", None)
                place = tokenizer_of_checkpoint(folder, kind, recorded)
            elif not place.exists():
                raise FileNotFoundError(f"--tokenizer is {place}, which does not exist")
        except FileNotFoundError as error:
            place = None
            if vocab_size is None:
                raise MissingTokenizerError(
                    error,
                    "give its place with --tokenizer, or the number of its tokens with "
                    "--vocab-size.",
                ) from None
        if place is not None:
            found = open_tokenizer(place)
            size = tokenizer_vocab_size(found)
    size = size if vocab_size is None else vocab_size
    if size is None:
        raise ValueError(f"{folder} does not say how many tokens there are; give --vocab-size.")
    if not 0 < size <= padded:
        raise ValueError(
            f"The vocabulary has {size} tokens and the embedding {padded} rows; give the right "
            "--tokenizer or --vocab-size."
        )
    return found, size


def training_of(arguments: Namespace, iteration: int) -> dict[str, Any]:
    """The facts of the training that a model card gives."""
    names = (
        "seq_length",
        "global_batch_size",
        "optimizer",
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "clip_grad",
        "seed",
    )
    facts = {name: getattr(arguments, name, None) for name in names}
    samples = getattr(arguments, "consumed_train_samples", None)
    if iteration:
        facts = {"iterations": iteration, "consumed_samples": samples} | facts
    if samples and facts.get("seq_length"):
        facts["consumed_tokens"] = samples * facts["seq_length"]
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in facts.items()
        if isinstance(value, (bool, int, float, str, torch.dtype))
    }


def arguments_for(
    model: OpenModel,
    dtype: torch.dtype,
    divisible_by: int,
    tokenizer_place: Path | None,
) -> Namespace:
    """The arguments that Megatron reads back under --use-checkpoint-args.

    Raises:
        ValueError: divisible_by is no positive number, or the layers are in no model of Megatron's.
    """
    if divisible_by < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by is {divisible_by}; it takes a positive integer."
        )
    shape = model.config
    values = shape.named("megatron")
    kind = model.tokenizer.kind if model.tokenizer else NULL_TOKENIZER
    length = model.training.get("seq_length", shape.chunk_size)
    rotary_base = shape.rotary_base
    values |= {
        "spec": ["megalodon_mcore.spec", "megalodon"],
        "rotary_base": int(rotary_base) if rotary_base == int(rotary_base) else rotary_base,
        "seq_length": length,
        "max_position_embeddings": length,
        "add_position_embedding": True,
        "untie_embeddings_and_output_weights": not shape.tied,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "params_dtype": dtype,
        "tokenizer_type": kind,
        "tokenizer_model": str(tokenizer_place) if tokenizer_place else None,
        # Other tokenizers know their own size, and Megatron would not ask them.
        "vocab_size": shape.vocab_size if kind == NULL_TOKENIZER else None,
        "make_vocab_size_divisible_by": divisible_by,
        "padded_vocab_size": math.ceil(shape.vocab_size / divisible_by) * divisible_by,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "world_size": 1,
        "use_distributed_optimizer": False,
        "ckpt_format": "torch_dist",
        "ckpt_fully_parallel_save": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "megalodon_sequence_order": "contiguous",
    }
    values = _without_attention(shape) | values | _layers(shape)
    if model.tokenizer and model.tokenizer.kind == NULL_TOKENIZER:
        values["null_tokenizer_eod_id"] = model.tokenizer.eos_token_id
    return Namespace(**values)


def _without_attention(shape: MegalodonConfig) -> dict[str, Any]:
    """What pretrain has where all layers are blocks; Megatron asks of attention none the less."""
    return {
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_heads,
        "kv_channels": max(1, shape.hidden_size // shape.num_heads),
    }


def _layers(shape: MegalodonConfig) -> dict[str, Any]:
    """Megatron's arguments for what each layer is, and for its attention's groups.

    Raises:
        ValueError: no arguments of Megatron's say so.
    """
    values: dict[str, Any] = {"group_query_attention": False}
    if shape.has("attention_heads"):
        values["group_query_attention"] = shape.attention_groups != shape.attention_heads
    blocks = [symbol for symbol in shape.symbols if symbol in BLOCKS]
    if "X" in blocks:
        if "E" in shape.symbols:
            raise ValueError(
                f"layers is {shape.layers}, which has both E and X; Megatron's experts are layers "
                "or in blocks, so only --to hf can hold the model."
            )
        # Of a list Megatron expects that layers differ.
        are_alike = set(blocks) == {"X"}
        values["moe_layer_freq"] = 1 if are_alike else [int(symbol == "X") for symbol in blocks]
    if layers_beside_blocks(shape.symbols):
        values["hybrid_layer_pattern"] = shape.symbols.replace("X", "M")
        values["is_hybrid_model"] = True
    return values
