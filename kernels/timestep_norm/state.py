"""The state of TimestepNorm between pieces of a sequence."""

from typing import NamedTuple

from torch import Tensor


class TimestepNormState(NamedTuple):
    """Steps so far, and mean and variance of their groups; see `timestep_norm`."""

    count: Tensor
    mean: Tensor
    var: Tensor
