"""The end-of-document token where a tokenizer adds it by itself, as in <s> ... </s>."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def without_end(ids: np.ndarray | Sequence[int], end: int) -> np.ndarray | Sequence[int]:
    """The ids without the end tokens that they end in."""
    stop = len(ids)
    while stop and ids[stop - 1] == end:
        stop -= 1
    return ids[:stop]


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a text to be continued, without the end token that the tokenizer may add.

    An end token that is spelled out in the prompt is the user's and stays.

    Args:
        tokenizer: one of Megatron's.
        prompt: the text.
    """
    ids = list(tokenizer.tokenize(prompt)) if prompt else []
    # "0" is a text that every tokenizer takes, Megatron's NullTokenizer of numbers too.
    adds_end = tokenizer.tokenize("0")[-1:] == [tokenizer.eod]
    return ids[:-1] if adds_end and ids[-1:] == [tokenizer.eod] else ids
