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
from megalodon_mcore.parallel.sequence_layout import Segment
from megalodon_mcore.parallel.sequence_shards import SequenceShards


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

    def forward(
        self,
        hidden_states: Tensor,
        shards: SequenceShards | None = None,
    ) -> Tensor:
        """Normalizes [length, batch, hidden_size].

        Args:
            hidden_states: the whole sequence, or this rank's share of it.
            shards: how ranks share the sequence; None where this rank has all of it.
        """
        if shards is None:
            return self._normalize(hidden_states, None)
        parts = shards.split(hidden_states)
        statistics = [
            torch.stack(timestep_statistics(part.transpose(0, 1), self.num_groups))
            for part in parts
        ]
        means, variances = shards.gather(statistics).unbind(1)
        normalized = [
            self._normalize(part, _merge(shards, segment, means, variances))
            for segment, part in zip(shards.own, parts, strict=True)
        ]
        return torch.cat(normalized) if len(normalized) > 1 else normalized[0]

    def _normalize(self, hidden_states: Tensor, state: TimestepNormState | None) -> Tensor:
        normalized, _ = timestep_norm(
            hidden_states.transpose(0, 1),
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            state=state,
        )
        return normalized.transpose(0, 1)


def _merge(
    shards: SequenceShards, segment: Segment, means: Tensor, variances: Tensor
) -> TimestepNormState:
    """The state of TimestepNorm when it reaches a segment (Chan et al., for many sets at once).

    means, variances: float64 [all segments, batch, groups], of each segment alone.
    """
    before = shards.number_before(segment)
    means, variances = means[:before], variances[:before]
    lengths = means.new_tensor([s.length for s in shards.all[:before]]).view(-1, 1, 1)
    count = max(segment.start, 1)
    mean = (lengths * means).sum(0) / count
    var = (lengths * (variances + (means - mean).square())).sum(0) / count
    steps = torch.full(mean.shape[:1], segment.start, dtype=torch.int64, device=mean.device)
    return TimestepNormState(steps, mean, var)


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


class LayerNormParameters(Float32Module):
    """The parameters of a LayerNorm that is computed inside the linear layer after it.

    They are a module of their own, and that layer gets them by calling it: so they stay float32
    and keep LayerNorm's names, and what Megatron hooks to a module's call, such as waiting for
    gathered parameters, happens.
    """

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = float32_parameter((hidden_size,), device)
        self.bias = float32_parameter((hidden_size,), device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Weight, as an offset from one, and bias; [hidden_size] each."""
        return self.weight, self.bias
