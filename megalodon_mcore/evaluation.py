"""Evaluation's arguments: defaults that work, and a sentence for what would fail in training."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from typing import Any
from unittest.mock import patch

from megalodon_mcore import full_validation
from megalodon_mcore.data.split_tokens import NAMES, SplitData, find_splits


def prepare(args: Namespace) -> None:
    """Checks validated arguments against the data they name, and fills in what Megatron needs.

    Raises:
        ValueError: the first that would not work; one sentence names it and what would.
    """
    if not args.eval_interval:
        # Its meaning by Megatron's help: only after training. Megatron divides by it.
        args.eval_interval = sys.maxsize
    if args.dataloader_type == "external" or args.dataloader_fast_cache_load:
        splits = [SplitData("", [], False, [])] * len(NAMES)
    else:
        splits = find_splits(args)
    _check_presence(args, splits)
    _check_validation_sets(args, splits[1])
    _check_single_passes(args, splits)
    full_validation.prepare(args)
    _weigh_tokens_alike(args)


def samples_to_build(args: Namespace, num_samples: list[int | None]) -> list[int | None]:
    """Samples of each split, where Megatron asks for too few.

    Its sampler cannot be made for none, which evaluation with --eval-iters 0 asks for; and with
    --start-eval-at-iter a multiple of --eval-interval it forgets the evaluation at that iteration.
    """
    train, valid, test = num_samples
    if valid is not None and args.start_eval_at_iter:
        valid += args.eval_iters * args.eval_global_batch_size
    return [None if number is None else max(1, number) for number in (train, valid, test)]


def _weigh_tokens_alike(args: Namespace) -> None:
    """Makes evaluation's loss the mean over tokens with --sft too.

    There Megatron takes the mean of every rank's micro-batches, whose answers are of any length.
    """
    args.packs_conversations = args.sft
    if not args.sft:
        return
    from megatron.training import training

    evaluate = training.evaluate

    @functools.wraps(evaluate)
    def evaluate_by_tokens(*arguments: Any, **options: Any) -> Any:
        with patch.object(args, "sft", False):
            return evaluate(*arguments, **options)

    training.evaluate = evaluate_by_tokens


def _check_presence(args: Namespace, splits: list[SplitData | None]) -> None:
    train, valid, test = splits
    where = f"--split is {args.split}" if args.split else "There is no --train-data-path"
    if train is None and not args.skip_train:
        raise ValueError(
            f"{where}, which leaves no training data; give it some, or --skip-train to evaluate."
        )
    if valid is not None or not (args.eval_iters or args.full_validation):
        return
    where = f"--split is {args.split}" if args.split else "there is no --valid-data-path"
    if test is not None or args.skip_train:
        raise ValueError(
            f"--eval-iters is {args.eval_iters}, but {where}, which leaves no validation data; "
            "give it some, or take --eval-iters 0."
        )
    args.eval_iters, args.full_validation = 0, False
    if args.rank == 0:
        print(
            f"megalodon-mcore pretrain: {where}, which leaves no validation data, so that nothing "
            "is evaluated."
        )


def _check_validation_sets(args: Namespace, valid: SplitData | None) -> None:
    if args.multiple_validation_sets and not args.full_validation:
        raise ValueError(
            "--multiple-validation-sets is set, which Megatron can evaluate only whole; add "
            "--full-validation."
        )
    if args.validation_set_names and not args.multiple_validation_sets:
        raise ValueError(
            f"--validation-set-names is {' '.join(args.validation_set_names)}, but there is one "
            "set without --multiple-validation-sets; add it or leave the names out."
        )
    if not args.full_validation or valid is None:
        return
    if args.mock_data:
        raise ValueError(
            "--full-validation is set, but --mock-data is made as long as it is asked for; leave "
            "one of them out."
        )
    if valid.weighted and len(valid.prefixes) > 1:
        raise ValueError(
            f"{valid.argument} has weights, but --full-validation takes every sample once; leave "
            "out the weights."
        )
    # Of --data-path Megatron makes one set, however many there are.
    sets = len(valid.prefixes) if args.split is None and valid.prefixes else 1
    if args.validation_set_names and len(args.validation_set_names) != sets:
        raise ValueError(
            f"--validation-set-names has {len(args.validation_set_names)} names and there are "
            f"{sets} validation sets; give one name for each."
        )


def _check_single_passes(args: Namespace, splits: list[SplitData | None]) -> None:
    """Checks the data that Megatron takes once and does not repeat."""
    for name, split, needed in zip(NAMES, splits, _needed_samples(args), strict=True):
        if split is None or not split.tokens:
            continue
        whole = name == "validation" and args.full_validation
        samples = split.samples(args.seq_length)
        if whole and (not all(samples) if args.multiple_validation_sets else not sum(samples)):
            raise ValueError(
                f"--full-validation takes samples of --seq-length {args.seq_length} and one more "
                f"token, but {split.prefixes[samples.index(0)]} has {min(split.tokens)} tokens of "
                "validation data; give more or a smaller --seq-length."
            )
        once = len(split.prefixes) > 1 and not split.weighted and args.dataloader_type == "single"
        if once and not whole and sum(samples) < needed:
            raise ValueError(
                f"{split.argument} has several datasets without weights, of which Megatron takes "
                f"every sample once: {sum(samples)} of {name} data, but {needed} are needed; put "
                "a weight before each, with which they are repeated."
            )


def _needed_samples(args: Namespace) -> tuple[int, int, int]:
    """How many samples of each split a run takes."""
    train = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    evaluation = args.eval_iters * args.eval_global_batch_size
    evaluations = 1
    if not args.skip_train:
        iterations = args.train_iters or train // args.global_batch_size
        evaluations += iterations // args.eval_interval
        evaluations -= max(0, (args.start_eval_at_iter or 0) - 1) // args.eval_interval
    return 0 if args.skip_train else train, max(1, evaluations) * evaluation, evaluation
