"""How Megalodon's parameters start (released get_init_fn and module initializers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.parameters import LAYER_ROWS, Row

Initializer = Callable[[Tensor], Tensor]


def projection_initializer(init_mode: str, fan_in: int, fan_out: int) -> Initializer:
    """The initializer of a weight with these fans, whatever part of it a rank holds.

    `he` is Kaiming-normal with a = sqrt(5), which comes to std 1/sqrt(3 fan_in); `gaussian` has
    the released unit deviation.
    """
    if init_mode == "he":
        return partial(nn.init.normal_, mean=0.0, std=1.0 / math.sqrt(3.0 * fan_in))
    if init_mode == "bert":
        return partial(nn.init.normal_, mean=0.0, std=0.02)
    if init_mode == "xavier":
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        return partial(nn.init.uniform_, a=-bound, b=bound)
    if init_mode == "gaussian":
        return partial(nn.init.trunc_normal_, mean=0.0, std=1.0, a=-3.0, b=3.0)
    raise ValueError(f"init_mode is {init_mode!r}; it takes he, bert, xavier or gaussian.")


def embedding_initializer(hidden_size: int) -> Initializer:
    """Truncated N(0, 1/sqrt(hidden_size)) at three deviations, for embedding and output."""
    std = 1.0 / math.sqrt(hidden_size)
    return partial(nn.init.trunc_normal_, mean=0.0, std=std, a=-3.0 * std, b=3.0 * std)


def concatenated_initializer(initializers: list[Initializer], sizes: list[int]) -> Initializer:
    """Initializes a [out, k * sum(sizes)] weight: k times over, column ranges of these sizes.

    A rank's part has k = 1; Megatron's CPU initialization fills all ranks' parts side by side.
    """

    def initialize(weight: Tensor) -> Tensor:
        repeats = weight.shape[1] // sum(sizes)
        parts = weight.split(sizes * repeats, dim=1)
        for part, part_initializer in zip(parts, initializers * repeats, strict=True):
            part.copy_(part_initializer(torch.empty_like(part)))
        return weight

    return torch.no_grad()(initialize)


def weight_initializer(name: str, config: MegalodonConfig, ranks: int = 1) -> Initializer:
    """The initializer of a rank's part of a linear layer's weight.

    Args:
        name: the weight's, in the table of parameters.
        config: of the model.
        ranks: how many share the columns of weights that lie side by side.
    """
    rows = [row for row in LAYER_ROWS if row.mcore == name]
    shapes = [row.shape_in(config) for row in rows]
    parts = [
        projection_initializer(config.init_mode, fan_in=shape[1], fan_out=shape[0])
        for shape in shapes
    ]
    if rows[0].part is None or rows[0].part.axis == 0:
        return parts[0]
    return concatenated_initializer(parts, [shape[1] // ranks for shape in shapes])


@torch.no_grad()
def fill_cema_parameter(parameter: Tensor, row: Row) -> None:
    """Fills one of CEMA's parameters in place as its row of the table says; all channels of it."""
    if row.init == "decay":
        parameter.normal_(mean=0.0, std=0.2)
    elif row.init == "frequency":
        channels = len(parameter)
        steps = torch.arange(1, channels + 1, dtype=torch.float64)
        frequencies = torch.exp(-math.log(channels) / channels * steps)
        shuffled = frequencies[torch.randperm(channels)]
        # One channel has the single frequency 1, whose logit is infinite; the released code never
        # meets it, so it starts at the largest finite float32 sigmoid below one.
        parameter.copy_(torch.logit(shuffled, eps=1e-7).view(channels, 1, 1))
    elif row.init == "readout":
        parameter[..., 0].normal_(mean=0.0, std=1.0)
        parameter[..., 1].zero_()
    elif row.init == "direct":
        nn.init.trunc_normal_(parameter, mean=0.0, std=0.25, a=-1.0, b=1.0)
    else:
        raise ValueError(f"{row.mcore} is none of CEMA's parameters.")
