"""Evaluates every sample of the validation data, with --full-validation.

Megatron-Core 0.19 does so for several validation sets alone, where every stage of a pipeline has
data and there is no test data. Its samples come one by one, whatever the micro-batch is.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch


def prepare(args: Namespace) -> None:
    """Sets the arguments that make Megatron's loop do it; without --full-validation nothing."""
    args.validation_sets_apart = args.multiple_validation_sets
    if not args.full_validation:
        return
    from megatron.training import training

    # One set goes the way of several.
    args.multiple_validation_sets = True
    # The test data still gives --eval-iters times --eval-global-batch-size samples.
    args.eval_iters *= args.eval_global_batch_size // args.data_parallel_size
    args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.data_parallel_size
    training.evaluate_and_print_results = _set_by_set(
        training.evaluate_and_print_results, args, args.eval_iters
    )


def _set_by_set(evaluate: Callable, args: Namespace, test_iterations: int) -> Callable:
    """Megatron's evaluation, told how many iterations validation sets or the test set have."""

    @functools.wraps(evaluate)
    def evaluate_sets(
        prefix: str,
        forward_step: Callable,
        iterators: Any,
        *arguments: object,
        **options: object,
    ) -> None:
        if isinstance(iterators, list):
            # Ranks without data do not know.
            counts = torch.tensor([count or 0 for count in args.eval_iters], device="cuda")
            torch.distributed.broadcast(counts, 0)
            args.eval_iters = counts.tolist()
            one = not args.validation_sets_apart
            iterations = args.eval_iters[0] if one else args.eval_iters
            iterators = iterators[0] if one else iterators
        elif test_iterations:
            one, iterations = True, test_iterations
        else:
            return
        others = {"full_validation": False, "multiple_validation_sets": not one}
        with patch.multiple(args, eval_iters=iterations, **others):
            evaluate(prefix, forward_step, iterators, *arguments, **options)

    return evaluate_sets
