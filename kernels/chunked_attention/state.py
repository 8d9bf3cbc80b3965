"""The state of chunked attention between pieces of a sequence."""

from typing import NamedTuple

from torch import Tensor


class AttentionState(NamedTuple):
    """Keys and values of the partly filled chunk; see `chunked_attention`."""

    key: Tensor
    value: Tensor
