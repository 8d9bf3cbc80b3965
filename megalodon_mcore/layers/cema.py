"""The complex exponential moving average as a module with float32 parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter
from megalodon_mcore.layers.initialization import initialize_cema


class ComplexEMA(Float32Module):
    """CEMA (paper section 3.1) on [length, batch, hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        cema_ndim: int,
        device: torch.device | None = None,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = float32_parameter((hidden_size, cema_ndim, 1), device)
        self.delta = float32_parameter((hidden_size, cema_ndim, 1), device)
        self.theta = float32_parameter((hidden_size, 1, 1), device)
        self.gamma = float32_parameter((hidden_size, cema_ndim, 2), device)
        self.omega = float32_parameter((hidden_size, 1), device)
        if initialize:
            initialize_cema(self.alpha, self.delta, self.theta, self.gamma, self.omega)

    def forward(
        self, hidden_states: Tensor, state: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the averages and, if asked, the complex64 [batch, hidden_size, N] state."""
        averages, state = cema(
            hidden_states.transpose(0, 1),
            self.alpha,
            self.delta,
            self.theta,
            self.gamma,
            self.omega,
            state=state,
            return_state=return_state,
        )
        return averages.transpose(0, 1), state
