"""Documents packed into a row: what Megatron's arguments ask for, and what would go wrong in it."""

from __future__ import annotations

import functools
import importlib.util
import logging
from argparse import Namespace
from typing import Any

from megalodon_mcore.parallel.sequence_layout import DOCUMENT_ZIGZAG, ORDER_OF_MEGATRON

logger = logging.getLogger(__name__)

FIM_TOKENS = ("prefix", "middle", "suffix", "pad", "eod")
"""What --fim-data needs a token of each, named by --fim-prefix-token and so on."""


def is_packed(args: Namespace) -> bool:
    """Whether Megatron's datasets say where documents start."""
    # During evaluation sft is unset.
    conversations = args.sft or getattr(args, "packs_conversations", False)
    return conversations or args.dataloader_inter_document_masking


def order_of_megatron(args: Namespace | None) -> str:
    """How get_batch of Megatron's scripts cuts: rows in zigzag, and conversations one by one."""
    return DOCUMENT_ZIGZAG if getattr(args, "sft", False) else ORDER_OF_MEGATRON


def check(args: Namespace, sequence_order: str) -> None:
    """Checks validated arguments, and warns of what Megatron's own scripts make of them.

    Raises:
        ValueError: arguments of packed data don't go together; one sentence names them.
    """
    masking, cp = args.dataloader_inter_document_masking, args.context_parallel_size
    if args.fim_data and is_packed(args):
        other = "--sft" if args.sft else "--dataloader-inter-document-masking"
        raise ValueError(
            f"--fim-data is set with {other}, but what it rearranges is in no known document "
            "afterwards; leave one of them out."
        )
    if args.sft:
        _check_conversations(args)
    elif masking and cp > 1 and sequence_order == DOCUMENT_ZIGZAG:
        raise ValueError(
            f"--megalodon-sequence-order is {DOCUMENT_ZIGZAG}, which cuts every document into "
            f"{2 * cp} equal parts, but --dataloader-inter-document-masking takes documents as "
            "they come; take contiguous or zigzag."
        )
    if hasattr(args, "megalodon_sequence_order"):
        return
    # What follows is about Megatron's own scripts.
    stages = args.pipeline_model_parallel_size
    if masking and (stages > 2 or args.virtual_pipeline_model_parallel_size):
        raise ValueError(
            f"--pipeline-model-parallel-size is {stages}, but Megatron's script gives stages in "
            "the middle no documents with --dataloader-inter-document-masking; take 2 at most and "
            "no virtual ones, or megalodon-mcore pretrain."
        )
    if cp > 1:
        _warn_of_unequal_shares(args.sft, args.eod_mask_loss, args.calculate_per_token_loss)


def _check_conversations(args: Namespace) -> None:
    if args.dataloader_inter_document_masking:
        raise ValueError(
            "--dataloader-inter-document-masking is set with --sft, which keeps conversations "
            "apart already; leave it out."
        )
    if args.mock_data:
        raise ValueError(
            "--mock-data is set with --sft, which reads conversations from JSONL; name files of "
            "them with --data-path or --train-data-path."
        )
    if args.tokenizer_type != "SFTTokenizer":
        raise ValueError(
            f"--tokenizer-type is {args.tokenizer_type}, which can't mark what is answered in a "
            "conversation; with --sft take SFTTokenizer, and a Hugging Face folder as "
            "--tokenizer-model."
        )
    if args.create_attention_mask_in_dataloader:
        raise ValueError(
            "--sft makes no attention masks; add --no-create-attention-mask-in-dataloader."
        )
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("--sft reads conversations with datasets; pip install datasets.")


@functools.cache
def _warn_of_unequal_shares(sft: bool, eod_mask_loss: bool, calculate_per_token_loss: bool) -> None:
    """Says once what `megalodon-mcore pretrain` does better.

    https://github.com/NVIDIA/Megatron-LM/issues/7452 (finding 9) and pull request 7513.
    """
    if (sft or eod_mask_loss) and not calculate_per_token_loss:
        masked = "--sft" if sft else "--eod-mask-loss"
        logger.warning(
            "%s masks tokens, and Megatron divides a context-parallel rank's loss by that rank's "
            "own: tokens of a rank with few of them weigh more; add --calculate-per-token-loss.",
            masked,
        )
    if sft:
        logger.warning(
            "With --sft Megatron evaluates by the mean of every rank's micro-batches, whatever "
            "number of tokens is in each."
        )


def check_prompt_format(args: Namespace, tokenizer: Any) -> None:
    """Checks that the tokenizer has what --sft writes conversations with.

    Raises:
        ValueError: it has not; one sentence names the arguments.
    """
    found = getattr(getattr(tokenizer, "_tokenizer", None), "_prompt_config", None)
    chosen = f"--sft-tokenizer-prompt-format is {args.sft_tokenizer_prompt_format}"
    if found is not None and found.pad_token_id is None:
        raise ValueError(
            f"{chosen}, whose padding token the tokenizer of --tokenizer-model does not have; take "
            "one with it (<unk>; <SPECIAL_233> for nemotron-h-aligned) or another format."
        )
    if found is not None and found.custom_chat_template is None:
        raise ValueError(
            f"{chosen}, which takes the chat template of the tokenizer of --tokenizer-model, and "
            "that has none; take a tokenizer with one or another format."
        )


def check_fim_tokens(args: Namespace, tokenizer: Any) -> None:
    """Checks that the tokenizer has a token of its own for each that --fim-data inserts.

    Raises:
        ValueError: it has not; one sentence names the argument.
    """
    look_up = getattr(getattr(tokenizer, "_tokenizer", None), "tokens_to_ids", None)
    for name in FIM_TOKENS:
        token = getattr(args, f"fim_{name}_token")
        (found,) = [None] if look_up is None else look_up([token])
        if found is None or found == getattr(tokenizer, "unk", None):
            raise ValueError(
                f"--fim-{name}-token is {token}, which the tokenizer of --tokenizer-type "
                f"{args.tokenizer_type} has no token for; with --fim-data name one that it has."
            )
