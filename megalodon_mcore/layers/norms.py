"""TimestepNorm, RMSNorm and LayerNorm; each stores its weight as an offset from one."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.row_norm import layer_norm, rms_norm
from megalodon_mcore.kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm,
    timestep_statistics,
)
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter
from megalodon_mcore.parallel.sequence_shards import Earlier, SequenceShards


class TimestepNorm(Float32Module):
    """Group normalization over everything seen so far (paper section 3.2)."""

    def __init__(
        self, hidden_size: int, num_groups: int, eps: float, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = float32_parameter((hidden_size,), device)
        self.bias = float32_parameter((hidden_size,), device)

    def forward(self, hidden_states: Tensor, shards: SequenceShards) -> Tensor:
        """Normalizes [length, batch, hidden_size], cut as `shards` says."""
        state = None
        if shards.joined:
            statistics = timestep_statistics(hidden_states, self.num_groups, shards.leaving)
            hidden_states, earlier = shards.exchange(hidden_states, torch.stack(statistics, dim=1))
            state = TimestepNormState(*map(shards.as_states, _merged(earlier)))
        normalized, _ = timestep_norm(
            hidden_states,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            shards.segments,
            state,
        )
        return normalized


def _merged(earlier: Earlier) -> tuple[Tensor, Tensor]:
    """Mean and variance [K, batch, groups] of all earlier segments (Chan et al., for many sets)."""
    means, variances = earlier.summaries.unbind(3)
    lengths = earlier.lengths[..., None, None]
    count = lengths.sum(1)
    mean = (lengths * means).sum(1) / count
    var = (lengths * (variances + (means - mean[:, None]).square())).sum(1) / count
    return mean, var


class RMSNorm(Float32Module):
    """x / rms(x) * (weight + 1) over the last dimension, in float32."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = float32_parameter((hidden_size,), device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [..., hidden_size] and keeps its dtype."""
        return rms_norm(hidden_states, self.weight, self.eps)


class LayerNorm(Float32Module):
    """Layer normalization with scale (weight + 1) over the last dimension, in float32."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = float32_parameter((hidden_size,), device)
        self.bias = float32_parameter((hidden_size,), device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [..., hidden_size] and keeps its dtype."""
        return layer_norm(hidden_states, self.weight, self.bias, self.eps)


class LayerNormParameters(LayerNorm):
    """The parameters of a LayerNorm that is computed inside the linear layer after it.

    They are a module of their own, and that layer gets them by calling it: so they stay float32
    and keep LayerNorm's names, and what Megatron hooks to a module's call, such as waiting for
    gathered parameters, happens.
    """

    def forward(self) -> tuple[Tensor, Tensor]:
        """Weight, as an offset from one, and bias; [hidden_size] each."""
        return self.weight, self.bias
