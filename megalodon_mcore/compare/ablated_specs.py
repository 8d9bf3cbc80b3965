"""Megalodons without one of their parts, for `compare --ablations` alone: --spec of this module."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalodon_mcore.kernels.row_norm import layer_norm
from megalodon_mcore.layers.block import FinalTimestepNorm, MegalodonLayer
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.norms import TimestepNorm
from megalodon_mcore.parallel.sequence_shards import SequenceShards
from megalodon_mcore.spec import MegalodonSpec, Parts


class NoAverages(ComplexEMA):
    """Hands its input on. Its parameters stay where checkpoints look for them, and do nothing."""

    def forward(self, hidden_states: Tensor, shards: SequenceShards) -> Tensor:
        """[length, batch, channels], as they are."""
        return hidden_states


class TokenNorm(TimestepNorm):
    """LayerNorm with TimestepNorm's parameters: what came before a token says nothing of it."""

    def forward(self, hidden_states: Tensor, shards: SequenceShards) -> Tensor:
        """Normalizes [length, batch, hidden_size]."""
        return layer_norm(hidden_states, self.weight, self.bias, self.eps)


class FinalTokenNorm(FinalTimestepNorm):
    """The same as the model's last norm; of rows, since documents are not packed here."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes [length, batch, hidden_size]."""
        return layer_norm(hidden_states, self.weight, self.bias, self.eps).to(self.output_dtype)


class LayerWithoutCema(MegalodonLayer):
    """A block whose attention and gates read the normalized input itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It was made as ever, so that all other first values are those of the whole model.
        self.mixer.cema.__class__ = NoAverages
        self.mixer.cema.requires_grad_(False)


class LayerWithoutTimestepNorm(MegalodonLayer):
    """A block whose mixer begins with LayerNorm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixer.timestep_norm.__class__ = TokenNorm


@dataclass(frozen=True)
class AblatedSpec(MegalodonSpec):
    """A Megalodon of other layers.

    layer: in the place of MegalodonLayer.
    final_norm: in the place of FinalTimestepNorm.
    """

    layer: type[MegalodonLayer] = MegalodonLayer
    final_norm: type[FinalTimestepNorm] = FinalTimestepNorm

    def _parts(self, *args: Any) -> Parts:
        parts = super()._parts(*args)
        layer = dataclasses.replace(parts.layer, module=self.layer)
        norm = functools.partial(self.final_norm, **parts.final_norm.keywords)
        return parts._replace(layer=layer, final_norm=norm)


no_cema = AblatedSpec(layer=LayerWithoutCema)
no_timestep_norm = AblatedSpec(layer=LayerWithoutTimestepNorm, final_norm=FinalTokenNorm)
