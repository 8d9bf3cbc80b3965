"""The state of TimestepNorm between segments of a document."""

from typing import NamedTuple

from torch import Tensor


class TimestepNormState(NamedTuple):
    """Mean and variance of all that a document held so far; see `timestep_norm`."""

    mean: Tensor
    var: Tensor
