"""Runs a built model piece by piece in constant memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megalodon_mcore.cpu import unwatched
from megalodon_mcore.kernels.timestep_norm import TimestepNormState
from megalodon_mcore.layers.mixer import MixerState
from megalodon_mcore.token_step import TokenStep, can_step


class StreamState(NamedTuple):
    """All that a model remembers of a sequence: a few vectors and at most one chunk a layer."""

    layers: list[MixerState]
    final_norm: TimestepNormState | None


class StreamingModel:
    """A whole Megalodon on one rank, fed any number of tokens at a time.

    A call with one token a row takes a TokenStep where one can run, all others the modules; either
    goes on from the other's states. A state is never changed: several sequences may go on from it.
    The model may be changed before a sequence starts and before or after a call with more tokens.
    Between single tokens, parameters may change in place, unless it is through `.data`.

    Args:
        model: a GPTModel built from a MegalodonSpec with both its embedding and its output.
        piece_length: positions computed at once; a longer input is cut into such pieces.
    """

    def __init__(self, model: GPTModel, piece_length: int = 2048) -> None:
        if not (model.pre_process and model.post_process):
            raise ValueError("The model is one pipeline stage of several; build it on one rank.")
        self.model = model.eval()
        self.piece_length = piece_length
        self._step: TokenStep | None = None
        self._looked = False

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, state: StreamState | None = None, all_logits: bool = False
    ) -> tuple[Tensor, StreamState]:
        """Continues a sequence.

        Args:
            tokens: int64 [batch, length], length at least 1.
            state: what the last call returned; None at the start of a sequence.
            all_logits: return the logits of every position, not of the last alone.

        Returns:
            float32 logits [batch, length or 1, padded vocabulary], and the state after the input.
        """
        if tokens.shape[1] == 0:
            raise ValueError("tokens is empty; give at least one.")
        if tokens.shape[1] == 1:
            with unwatched():
                step = self._token_step(tokens, state)
                if step is not None:
                    states = state or step.empty_state(len(tokens))
                    logits, *after = step(tokens, *states)
                    return logits.float(), StreamState(*after)
        else:
            self._looked = False
        collected = []
        pieces = tokens.split(self.piece_length, dim=1)
        with unwatched():
            for index, piece in enumerate(pieces):
                hidden_states, state = self._hidden_states(piece, state)
                if all_logits:
                    collected.append(self._logits(hidden_states))
                elif index == len(pieces) - 1:
                    collected.append(self._logits(hidden_states[-1:]))
        assert state is not None
        return torch.cat(collected, dim=1), state

    def _token_step(self, tokens: Tensor, state: StreamState | None) -> TokenStep | None:
        """The step for these tokens; None where the modules have to do it."""
        if state is None or not self._looked or (self._step and not self._step.is_current()):
            self._step = TokenStep(self.model) if can_step(self.model) else None
            self._looked = True
        # Of another batch size, the modules' kernels say what is wrong.
        fits = state is None or len(state.final_norm.count) == len(tokens)
        return self._step if fits and not self.model.training else None

    def _hidden_states(
        self, tokens: Tensor, state: StreamState | None
    ) -> tuple[Tensor, StreamState]:
        decoder = self.model.decoder
        states = state.layers if state else [None] * len(decoder.layers)
        hidden_states = self.model.embedding(input_ids=tokens, position_ids=None)
        outgoing = []
        for layer, layer_state in zip(decoder.layers, states, strict=True):
            hidden_states, layer_state = layer.stream(hidden_states, layer_state)
            outgoing.append(layer_state)
        hidden_states, norm_state = decoder.final_layernorm.stream(
            hidden_states, state.final_norm if state else None
        )
        return hidden_states, StreamState(outgoing, norm_state)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.model.output_layer(hidden_states, weight=weight)
        return logits.transpose(0, 1).float()
