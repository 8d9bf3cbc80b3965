"""One token through a whole model on the CPU, without what modules and autograd cost a call.

What a token costs beyond reading the weights is the number of calls, Python's and torch's: so this
keeps the modules' parameters, and what is computed from them alone, where it needs them.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_mcore.kernels.cema import StepWeights, cema_decayed, drive_, step_weights
from megalodon_mcore.kernels.chunked_attention import AttentionState, attention_step
from megalodon_mcore.kernels.dispatch import use_triton
from megalodon_mcore.kernels.query_key import query_key_step
from megalodon_mcore.kernels.query_key.turns import turns
from megalodon_mcore.kernels.row_norm import rms_norm_step
from megalodon_mcore.kernels.timestep_norm import TimestepNormState, timestep_norm_step
from megalodon_mcore.layers.block import FinalTimestepNorm, MegalodonLayer
from megalodon_mcore.layers.cema import ComplexEMA
from megalodon_mcore.layers.feed_forward import MegalodonFeedForward, Rescale
from megalodon_mcore.layers.mixer import MegalodonMixer, MixerState
from megalodon_mcore.layers.norms import LayerNorm, RMSNorm, TimestepNorm
from megalodon_mcore.layers.query_key import QueryKey

# Modules whose arithmetic this file repeats, to be met exactly and not by a subclass.
KNOWN = {
    *(ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding),
    *(MegalodonLayer, MegalodonMixer, MegalodonFeedForward, FinalTimestepNorm),
    *(TimestepNorm, ComplexEMA, RMSNorm, LayerNorm, QueryKey, Rescale),
}


def can_step(model: GPTModel) -> bool:
    """Whether TokenStep computes what the model's modules do.

    Not where tensor or context parallelism shares a sequence among ranks, a linear layer is
    Transformer Engine's or emulates FP8, a norm is apex's, a module has hooks or trains, autocast
    is on, or tensors are on a GPU (where the calls' own time matters less) or for Triton's
    interpreter.
    """
    return (
        all(layer.ranks_per_sample == 1 for layer in model.decoder.layers)
        and not torch.is_autocast_enabled("cpu")
        and all(p.device.type == "cpu" and not use_triton(p) for p in model.parameters())
        and all(_is_plain(module) for module in model.modules())
    )


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in KNOWN or not module._parameters
    hooks = module._forward_hooks or module._forward_pre_hooks
    return known and not hooks and not module.training


class _Norm(NamedTuple):
    """TimestepNorm's or LayerNorm's weight + 1, bias and eps."""

    gain: Tensor
    bias: Tensor
    eps: float


class _Layer(NamedTuple):
    """What a block computes with. Linear layers are weight and bias; scales are as kernels say."""

    timestep_norm: _Norm
    cema_direct: Tensor
    cema_norm: tuple[Tensor, Tensor]
    z: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    r: tuple[Tensor, Tensor]
    query_key: tuple[Tensor, Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    feed_forward_norm: _Norm
    fc1: Tensor
    fc2: Tensor
    rescale: Tensor | None


class TokenStep:
    """Reads one token of every sequence, without gradients.

    Args:
        model: one for which `can_step` is true. Its matrices are kept by reference, so that they
            may change in place; for the rest see `is_current`.
    """

    def __init__(self, model: GPTModel) -> None:
        layers, config = model.decoder.layers, model.config
        own, mixer = layers[0].mixer.megalodon, layers[0].mixer
        self.dtype, self.swiglu = config.params_dtype, config.gated_linear_unit
        self.wide_residual = config.fp32_residual_connection
        self.embedding_scale = layers[0].embedding_scale
        self.chunk_size, self.ndim = own.chunk_size, own.cema_ndim
        self.heads, self.head_dim = mixer.query_key.num_heads, mixer.query_key.head_dim
        self.value_dim = own.value_dim
        self.groups = own.norm_num_groups
        self.turns = turns(
            *(self.chunk_size, self.head_dim, float(mixer.query_key.rotary_base)),
            *(torch.device("cpu"), mixer.query_key.weight.dtype.to_complex()),
        )
        self.derived_from = _derived_from(model)
        self.versions = [parameter._version for parameter in self.derived_from]
        self.cema = _cema_of_all(layers)
        self.layers = [
            _layer(*pair) for pair in zip(layers, self.cema.direct.unbind(0), strict=True)
        ]
        # The CEMA states of the last call, and all of them as the one tensor that they lie in.
        self.last: tuple[list[Tensor], Tensor] | None = None
        self.final_norm = _norm(model.decoder.final_layernorm)
        self.output_dtype = model.decoder.final_layernorm.output_dtype
        self.embedding = model.embedding.word_embeddings.weight
        tied = model.share_embeddings_and_output_weights
        self.output = self.embedding if tied else model.output_layer.weight

    def is_current(self) -> bool:
        """Whether the vectors and CEMA's parameters, of which it keeps functions, are unchanged.

        It goes by torch's version counters, which writing through `.data` and writing to tensors
        made in inference mode leave alone.
        """
        return [parameter._version for parameter in self.derived_from] == self.versions

    def empty_state(self, batch: int) -> tuple[list[MixerState], TimestepNormState]:
        """The states of all layers and of the final norm before a sequence's first token."""
        gain, count = self.final_norm.gain, torch.zeros(batch, dtype=torch.int64)
        zeros = gain.new_zeros(batch, self.groups)
        norm = TimestepNormState(count, zeros, zeros)
        shape = (batch, len(gain), self.ndim)
        cema = torch.zeros(shape, dtype=gain.dtype.to_complex())
        key, value = (
            torch.empty(batch, 0, self.heads, width, dtype=self.dtype)
            for width in (self.head_dim, self.value_dim // self.heads)
        )
        layer = MixerState(norm, cema, AttentionState(key, value))
        return [layer] * len(self.layers), norm

    def __call__(
        self, tokens: Tensor, states: list[MixerState], norm_state: TimestepNormState
    ) -> tuple[Tensor, list[MixerState], TimestepNormState]:
        """Continues sequences by a token each.

        Args:
            tokens: int64 [batch, 1].
            states: of every layer, as MegalodonLayer.stream or empty_state returns them; all of
                as many steps as norm_state.
            norm_state: of the final norm.

        Returns:
            Logits [batch, 1, padded vocabulary] in the output layer's type, and the states after.
        """
        # One for all: layers have seen the same number of steps.
        count = norm_state.count + 1
        share = count.double().reciprocal_().unsqueeze(-1)
        turn = self.turns[states[0].attention.key.shape[1]]
        x = F.embedding(tokens[:, 0], self.embedding)
        if self.wide_residual:
            x = x.float()
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        decayed, responses = cema_decayed(self.cema, self._cema_states(states))
        outgoing, cema_states, cema_inputs = [], list(decayed.unbind(0)), []
        of_layers = (self.layers, states, cema_states, responses.unbind(0))
        for layer, state, cema_state, response in zip(*of_layers, strict=True):
            _, mean, var = state.timestep_norm
            normalized, mean, var = timestep_norm_step(x, *layer.timestep_norm, mean, var, share)
            normalized = _to(normalized, self.dtype)
            cema_inputs.append(normalized)
            update, attention = self._mixer(layer, normalized, response, state.attention, turn)
            x = x + self._feed_forward(layer, x + update)
            norm = TimestepNormState(count, mean, var)
            outgoing.append(MixerState(norm, cema_state, attention))
        drive_(decayed, self.cema, _to(torch.stack(cema_inputs), responses.dtype))
        self.last = cema_states, decayed
        _, mean, var = norm_state
        x, mean, var = timestep_norm_step(x, *self.final_norm, mean, var, share)
        logits = F.linear(_to(x, self.output_dtype), self.output)
        return logits[:, None], outgoing, TimestepNormState(count, mean, var)

    def _cema_states(self, states: list[MixerState]) -> Tensor:
        """Of all layers, [layers, batch, hidden_size, N]."""
        own = [state.cema for state in states]
        if self.last is not None and all(map(operator.is_, own, self.last[0])):
            return self.last[1]
        return torch.stack(own)

    def _mixer(
        self,
        layer: _Layer,
        normalized: Tensor,
        cema_response: Tensor,
        attention: AttentionState,
        turn: Tensor,
    ) -> tuple[Tensor, AttentionState]:
        """MegalodonMixer.forward of [batch, hidden_size], from after its TimestepNorm."""
        averages = torch.addcmul(
            cema_response, layer.cema_direct, _to(normalized, cema_response.dtype)
        )
        mixed = rms_norm_step(_to(averages, self.dtype), *layer.cema_norm)
        # One after the other: what runs after a product finds the caches full of its weights.
        z, r = F.linear(mixed, *layer.z), F.linear(mixed, *layer.r)
        v = F.linear(normalized, *layer.v)
        by_head = (len(z), self.heads, -1)
        query, key = query_key_step(z.view(by_head), *layer.query_key, turn)
        value = F.silu(v).view(by_head)
        attended, attention = attention_step(query, key, value, self.chunk_size, attention)
        gated = F.silu(r).mul_(attended.view(r.shape))
        update = F.linear(torch.cat((mixed, gated), -1), *layer.proj)
        return update, attention

    def _feed_forward(self, layer: _Layer, x: Tensor) -> Tensor:
        """MegalodonFeedForward.forward of [batch, hidden_size]."""
        gain, bias, eps = layer.feed_forward_norm
        normalized = torch.layer_norm(x, gain.shape, gain, bias, eps)
        hidden = F.linear(_to(normalized, self.dtype), layer.fc1)
        if self.swiglu:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.silu(hidden)
        output = F.linear(hidden, layer.fc2)
        return output if layer.rescale is None else _to(output * layer.rescale, self.dtype)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _derived_from(model: GPTModel) -> list[Tensor]:
    """The parameters whose functions are kept, where torch counts their versions."""
    kinds = (TimestepNorm, ComplexEMA, RMSNorm, LayerNorm, QueryKey)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    return [parameter for parameter in parameters if not parameter.is_inference()]


def _norm(norm: TimestepNorm | LayerNorm) -> _Norm:
    return _Norm(norm.weight + 1, norm.bias.detach(), norm.eps)


def _cema_of_all(layers: nn.ModuleList) -> StepWeights:
    """One tensor for all layers, with a dimension for the batch."""
    weights = [
        step_weights(cema.alpha, cema.delta, cema.theta, cema.gamma, cema.omega)
        for cema in (layer.mixer.cema for layer in layers)
    ]
    return StepWeights(*(torch.stack(parts).unsqueeze(1) for parts in zip(*weights, strict=True)))


def _layer(layer: MegalodonLayer, cema_direct: Tensor) -> _Layer:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    norm, query_key = mixer.cema_norm, mixer.query_key
    heads, width = query_key.num_heads, query_key.head_dim

    def root(size: int, eps: float) -> Tensor:
        return norm.weight.new_tensor(math.sqrt(size * eps))

    def linear(name: str) -> tuple[Tensor, Tensor]:
        module = getattr(mixer, f"linear_{name}")
        return module.weight, module.bias

    return _Layer(
        timestep_norm=_norm(mixer.timestep_norm),
        cema_direct=cema_direct,
        cema_norm=(
            (norm.weight + 1) * math.sqrt(len(norm.weight)),
            root(len(norm.weight), norm.eps),
        ),
        z=linear("z"),
        v=linear("v"),
        r=linear("r"),
        query_key=(
            (query_key.weight + 1).view(2, 1, heads, width),
            query_key.bias.view(2, 1, heads, width),
            root(width, query_key.eps),
        ),
        proj=linear("proj"),
        feed_forward_norm=_norm(feed_forward.norm),
        fc1=feed_forward.linear_fc1.weight,
        fc2=feed_forward.linear_fc2.weight,
        rescale=None if feed_forward.rescale is None else feed_forward.rescale.weight,
    )
