"""The complex exponential moving average as a module with float32 parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.cema import cema, cema_response, coefficients, powers
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter
from megalodon_mcore.layers.initialization import fill_cema_parameter
from megalodon_mcore.parallel.sequence_layout import Segment
from megalodon_mcore.parallel.sequence_shards import SequenceShards
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

    def forward(
        self,
        hidden_states: Tensor,
        shards: SequenceShards | None = None,
    ) -> Tensor:
        """Averages [length, batch, channels].

        Args:
            hidden_states: the whole sequence, or this rank's share of it.
            shards: how ranks share the sequence; None where this rank has all of it.
        """
        if shards is None:
            return self._average(hidden_states, False)[0]
        parts = [self._average(part, True) for part in shards.split(hidden_states)]
        states = shards.gather([torch.view_as_real(state) for _, state in parts])
        states = torch.view_as_complex(states)
        outputs = []
        for segment, (averages, _) in zip(shards.own, parts, strict=True):
            incoming = self._incoming_state(shards, segment, states)
            response = cema_response(
                incoming, self.alpha, self.delta, self.theta, self.gamma, segment.length
            )
            outputs.append(averages + response.transpose(0, 1).to(averages.dtype))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _average(self, hidden_states: Tensor, return_state: bool) -> tuple[Tensor, Tensor | None]:
        averages, state = cema(
            hidden_states.transpose(0, 1),
            self.alpha,
            self.delta,
            self.theta,
            self.gamma,
            self.omega,
            return_state=return_state,
        )
        return averages.transpose(0, 1), state

    def _incoming_state(self, shards: SequenceShards, segment: Segment, states: Tensor) -> Tensor:
        """The state before a segment: earlier segments' own states, each decayed since its end.

        states: complex [all segments, batch, channels, N], of each segment after a zero state.
        """
        before = shards.number_before(segment)
        distances = [segment.start - earlier.stop for earlier in shards.all[:before]]
        _, log_magnitude, turns = coefficients(self.alpha, self.delta, self.theta)
        exponents = torch.tensor(distances, dtype=torch.float64, device=states.device)
        decay = powers(log_magnitude, turns, exponents, states.dtype.to_real())
        return torch.einsum("dsn,sbdn->bdn", decay, states[:before])


def rows_by_name() -> dict[str, Row]:
    """CEMA's rows of the table of parameters, by their names here."""
    rows = (row for row in LAYER_ROWS if row.mcore.startswith(PREFIX))
    return {row.mcore.removeprefix(PREFIX): row for row in rows}
