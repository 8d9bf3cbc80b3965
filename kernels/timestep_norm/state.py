"""What TimestepNorm carries from one piece of a sequence to the next."""

from typing import NamedTuple

from torch import Tensor


class TimestepNormState(NamedTuple):
    """What TimestepNorm knows about a sequence so far; see `timestep_norm`."""

    count: Tensor
    mean: Tensor
    var: Tensor
