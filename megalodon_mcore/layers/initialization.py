"""How Megalodon's parameters start (released get_init_fn and module initializers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def initialize_cema(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> None:
    """Fills CEMA's parameters in place; shapes as in the CEMA kernel."""
    channels = theta.shape[0]
    alpha.normal_(mean=0.0, std=0.2)
    delta.normal_(mean=0.0, std=0.2)
    frequencies = torch.exp(
        -math.log(channels) / channels * torch.arange(1, channels + 1, dtype=torch.float64)
    )
    shuffled = frequencies[torch.randperm(channels)]
    # One channel has the single frequency 1, whose logit is infinite; the released code never
    # meets it, so it starts at the largest finite float32 sigmoid below one.
    theta.copy_(torch.logit(shuffled, eps=1e-7).view(channels, 1, 1))
    gamma[..., 0].normal_(mean=0.0, std=1.0)
    gamma[..., 1].zero_()
    nn.init.trunc_normal_(omega, mean=0.0, std=0.25, a=-1.0, b=1.0)
