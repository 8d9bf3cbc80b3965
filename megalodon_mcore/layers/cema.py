"""The complex exponential moving average as a module with float32 parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_mcore.kernels.cema import cema, cema_response, coefficients, powers
from megalodon_mcore.layers.float32_module import Float32Module, float32_parameter
from megalodon_mcore.layers.initialization import initialize_cema
from megalodon_mcore.parallel.sequence_layout import Segment
from megalodon_mcore.parallel.sequence_shards import SequenceShards


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
        shapes = {
            "alpha": (cema_ndim, 1),
            "delta": (cema_ndim, 1),
            "theta": (1, 1),
            "gamma": (cema_ndim, 2),
            "omega": (1,),
        }
        channels = hidden_size // shares
        for name, shape in shapes.items():
            self.register_parameter(name, float32_parameter((channels, *shape), device))
        if initialize:
            # Of all channels, since the frequencies are dealt out among them.
            whole = {
                name: torch.empty(hidden_size, *shape, device=device)
                for name, shape in shapes.items()
            }
            initialize_cema(**whole)
            with torch.no_grad():
                for name, values in whole.items():
                    getattr(self, name).copy_(values.chunk(shares)[share])

    def forward(
        self,
        hidden_states: Tensor,
        shards: SequenceShards | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Averages [length, batch, channels].

        Args:
            hidden_states: the whole sequence, or this rank's share of it.
            shards: how ranks share the sequence; None where this rank has all of it.
            state: complex64 [batch, channels, N], what came before a whole sequence.
            return_state: whether to return the state after it; only without `shards`.
        """
        if shards is None:
            return self._average(hidden_states, state, return_state)
        segments = [self._average(segment, None, True) for segment in shards.split(hidden_states)]
        states = shards.gather([torch.view_as_real(state) for _, state in segments])
        states = torch.view_as_complex(states)
        outputs = []
        for place, (averages, _) in zip(shards.own, segments, strict=True):
            incoming = self._incoming_state(shards, place, states)
            response = cema_response(
                incoming, self.alpha, self.delta, self.theta, self.gamma, place.length
            )
            outputs.append(averages + response.transpose(0, 1).to(averages.dtype))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0], None

    def _average(
        self, hidden_states: Tensor, state: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
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
