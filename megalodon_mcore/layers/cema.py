"""The complex exponential moving average as a module with float32 parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.cema import cema, cema_summary, coefficients, powers
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter
from megalodon_mcore.layers.initialization import fill_cema_parameter
from megalodon_mcore.parallel.sequence_shards import Earlier, SequenceShards
from megalodon_mcore.parameters import LAYER_ROWS, Row

PREFIX = "mixer.cema."
"""Of its parameters in the table."""


class ComplexEMA(Float32Module):
    """CEMA (paper section 3.1) on [length, batch, channels].

    Args:
        hidden_size: channels of the model.
        cema_ndim: EMA dimensions per channel.
        device: where the parameters go.
        initialize: whether to fill them.
        share: which of the `shares` equal parts of the channels this module holds.
        shares: see share.
    """

    def __init__(
        self,
        hidden_size: int,
        cema_ndim: int,
        device: torch.device | None = None,
        initialize: bool = True,
        share: int = 0,
        shares: int = 1,
    ) -> None:
        super().__init__()
        for name, row in rows_by_name().items():
            whole = row.shape_of(D=hidden_size, N=cema_ndim)
            parameter = float32_parameter((hidden_size // shares, *whole[1:]), device)
            self.register_parameter(name, parameter)
            if initialize:
                # Of all channels, since the frequencies are dealt out among them.
                values = torch.empty(whole, device=device)
                fill_cema_parameter(values, row)
                with torch.no_grad():
                    parameter.copy_(values.chunk(shares)[share])

    def forward(self, hidden_states: Tensor, shards: SequenceShards) -> Tensor:
        """Averages [length, batch, channels], cut as `shards` says."""
        state = None
        if shards.joined:
            summaries = cema_summary(
                hidden_states, self.alpha, self.delta, self.theta, shards.leaving
            )
            hidden_states, earlier = shards.exchange(hidden_states, torch.view_as_real(summaries))
            state = shards.as_states(self._decayed(earlier))
        averages, _ = cema(
            hidden_states,
            self.alpha,
            self.delta,
            self.theta,
            self.gamma,
            self.omega,
            shards.segments,
            state,
        )
        return averages

    def _decayed(self, earlier: Earlier) -> Tensor:
        """The states before segments [K, batch, channels, N], complex.

        Earlier segments' own states have decayed since their ends.
        """
        _, log_magnitude, turns = coefficients(self.alpha, self.delta, self.theta)
        states = torch.view_as_complex(earlier.summaries.contiguous())
        distances = earlier.distances
        decay = powers(log_magnitude, turns, distances.flatten(), states.dtype.to_real())
        return torch.einsum("dkpn,kpbdn->kbdn", decay.unflatten(1, distances.shape), states)


def rows_by_name() -> dict[str, Row]:
    """CEMA's rows of the table of parameters, by their names here."""
    rows = (row for row in LAYER_ROWS if row.mcore.startswith(PREFIX))
    return {row.mcore.removeprefix(PREFIX): row for row in rows}
