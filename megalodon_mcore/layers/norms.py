"""TimestepNorm, RMSNorm and LayerNorm; each stores its weight as an offset from one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon_mcore.kernels.timestep_norm import TimestepNormState, timestep_norm
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter


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
        state: TimestepNormState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, TimestepNormState | None]:
        """Normalizes [length, batch, hidden_size]; the state is what the kernel documents."""
        normalized, state = timestep_norm(
            hidden_states.transpose(0, 1),
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            state=state,
            return_state=return_state,
        )
        return normalized.transpose(0, 1), state


class RMSNorm(Float32Module):
    """x / rms(x) * (weight + 1) over the last dimension, in float32."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = float32_parameter((hidden_size,), device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [..., hidden_size] and keeps its dtype."""
        normalized = F.rms_norm(
            hidden_states.float(), self.weight.shape, self.weight + 1.0, eps=self.eps
        )
        return normalized.to(hidden_states.dtype)


class LayerNorm(Float32Module):
    """Layer normalization with scale (weight + 1) over the last dimension, in float32."""

    def __init__(self, hidden_size: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = float32_parameter((hidden_size,), device)
        self.bias = float32_parameter((hidden_size,), device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [..., hidden_size] and keeps its dtype."""
        normalized = F.layer_norm(
            hidden_states.float(), self.weight.shape, self.weight + 1.0, self.bias, self.eps
        )
        return normalized.to(hidden_states.dtype)
