"""What chunked attention carries from one piece of a sequence to the next."""

from typing import NamedTuple

from torch import Tensor


class AttentionState(NamedTuple):
    """Keys and values of the partly filled chunk; see `chunked_attention`."""

    key: Tensor
    value: Tensor
