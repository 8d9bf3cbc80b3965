"""Megalodon (arXiv 2404.08801) for Hugging Face transformers; needs torch and transformers alone.

Shapes are written [batch, length, ...]. D is hidden_size, N cema_ndim, G norm_num_groups, C
chunk_size, H the heads, Z z_dim and E value_dim. A block computes

    t = TimestepNorm(x)                      m = RMSNorm(CEMA(t))
    z = RMSNorm_per_head(m Wz + bz)          q, k = z * (w + 1) / sqrt(Z/H) + b, each its own w, b
    v = silu(t Wv + bv)                      r = silu(m Wr + br)
    a = causal attention inside chunks of C positions of (rope(q), rope(k), v)
    y = x + (m Wh1 + bh1) + (a * r) Wh2
    out = x + FFN(LayerNorm(y)),  FFN(u) = (silu(u W1) * (u W3)) W2, or silu(u W1) W2

so that all it has to remember of a sequence, however long, are the running mean and variance of
TimestepNorm, the state of CEMA, and the keys and values of the chunk it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_megalodon import MegalodonConfig

CEMA_BLOCK = 64
# Up to this length CEMA's plain recurrence costs less than building a block's matrices.
CEMA_SHORT = 8
# Arguments by which transformers' collators and trainers mark samples packed into one row.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class LayerState(NamedTuple):
    """What a block remembers: TimestepNorm's statistics, CEMA's state, the chunk it is in."""

    mean: Tensor  # float64 [batch, G]
    var: Tensor  # float64 [batch, G]
    cema: Tensor  # complex64 [batch, D, N]
    keys: Tensor  # [batch, most steps of a row's chunk, H, Z/H]; a row's own come first
    values: Tensor  # [batch, the same, H, E/H]


class MegalodonCache(Cache):
    """All that a Megalodon remembers of a batch of sequences; its size does not grow with them."""

    is_compileable = False
    is_croppable = False

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(layers=[])
        self.num_layers = config.num_hidden_layers
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.layer_states: list[LayerState | None] = [None] * self.num_layers
        self.final_norm: tuple[Tensor, Tensor] | None = None
        self.steps_seen: Tensor | None = None  # int64 [batch] on the CPU, without padding
        self.length = 0  # with padding

    def __len__(self) -> int:
        return self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many steps were fed, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""

        def select(tensors: tuple | None) -> tuple | None:
            if tensors is None:
                return None
            rows = (z.index_select(0, indices.to(z.device)) for z in tensors)
            return LayerState(*rows) if isinstance(tensors, LayerState) else tuple(rows)

        if self.steps_seen is not None:
            self.steps_seen = self.steps_seen[indices.cpu()]
            self.final_norm = select(self.final_norm)
            self.layer_states = [select(state) for state in self.layer_states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.steps_seen is not None:
            rows = torch.arange(len(self.steps_seen))
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A MegalodonCache cannot be cropped, because running averages do not give back the "
            "steps they are made of; take copy.deepcopy of the cache before steps to be undone."
        )


class Span(NamedTuple):
    """Where a piece of steps lies in its rows; the same for every block.

    In a row the real steps come first and padding follows, so that causality alone keeps padding
    out of the results and only the states have to know where a row ends.
    """

    seen: Tensor  # int64 [batch]: real steps before the piece
    lengths: Tensor  # int64 [batch]: real steps in it
    cos: Tensor  # [batch or 1, length, 1, Z/H/2], the rotations' angles
    sin: Tensor
    mask: Tensor | None  # bool [batch or 1, 1, length, cached + length]; None: no keys are cached
    # Which of the cached and new keys to keep, int64 [batch, kept], or one slice for all rows; None
    # where no state is to be returned.
    kept: Tensor | slice | None


def first_span(
    config: MegalodonConfig, lengths: Tensor | None, like: Tensor, return_state: bool
) -> Span:
    """The span of rows that start with `like`, where their lengths need not be looked at.

    So that a compiled or exported model has no branch on data: there is no state to return, or
    lengths is None, because nothing is padded.
    """
    batch, length = like.shape[:2]
    position = torch.arange(length, device=like.device)[None]
    if lengths is None:
        lengths = position.new_full((batch,), length)
    lengths = lengths.to(like.device)
    kept = slice(length - length % config.chunk_size, length) if return_state else None
    cos, sin = angles(config, position, like)
    return Span(torch.zeros_like(lengths), lengths, cos, sin, None, kept)


def angles(config: MegalodonConfig, position: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotations at positions int64 [rows, length]."""
    pairs = torch.arange(config.z_dim // config.num_attention_heads // 2, device=like.device)
    frequency = config.rope_theta ** (-pairs.double() / len(pairs))
    angle = ((position % config.chunk_size)[..., None] * frequency)[:, :, None]
    dtype = at_least_float32(like).dtype
    return angle.cos().to(dtype), angle.sin().to(dtype)


def make_span(
    config: MegalodonConfig, seen: Tensor, lengths: Tensor, like: Tensor, return_state: bool
) -> Span:
    """The span of `like` [batch, length, D]; seen and lengths int64 [batch] on the CPU."""
    chunk_size, length = config.chunk_size, like.shape[1]
    fill = seen % chunk_size
    cached = int(fill.max())
    if (fill == fill[0]).all():
        fill = fill[:1]
    total = fill + lengths
    start = total - total % chunk_size
    kept_width = int((total - start).max())
    kept = None
    if return_state and (total == total[0]).all() and len(fill) == 1:
        first = cached + int(start[0] - fill[0]) if start[0] else 0
        kept = slice(first, first + kept_width)
    fill, start, seen, lengths = (z.to(like.device) for z in (fill, start, seen, lengths))

    # Positions count from the start of the chunk a row is in.
    position = fill[:, None] + torch.arange(length, device=like.device)
    cos, sin = angles(config, position, like)

    mask = None
    if cached:
        slots = torch.arange(cached, device=like.device).expand(len(fill), -1)
        empty = torch.iinfo(torch.int64).max
        key_position = torch.cat([slots.where(slots < fill[:, None], empty), position], dim=1)
        key, query = key_position[:, None, None, :], position[:, None, :, None]
        mask = (key <= query) & (key // chunk_size == query // chunk_size)
    if return_state and kept is None:
        index = start[:, None] + torch.arange(kept_width, device=like.device)
        kept = index.where(index < fill[:, None], cached + index - fill[:, None])
        kept = kept.clamp(max=cached + length - 1)
    return Span(seen, lengths, cos, sin, mask, kept)


def keep(z: Tensor, kept: Tensor | slice) -> Tensor:
    """The cached and new keys or values [batch, steps, ...] that a span keeps."""
    if isinstance(kept, slice):
        part = z[:, kept]
        # A smaller part is copied: a view of it would hold the memory of the whole.
        return part if part.shape == z.shape else part.clone()
    return z[torch.arange(len(z), device=z.device)[:, None], kept]


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def after(steps: Tensor, lengths: Tensor) -> Tensor:
    """steps[b, lengths[b]] of [batch, length + 1, ...]: what holds after a row's last step."""
    return steps[torch.arange(len(steps), device=steps.device), lengths]


class Float32Module(nn.Module):
    """Keeps its parameters in float32 when the model is cast to a narrower type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_wide(tensor: Tensor) -> Tensor:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(probe.device, torch.float32)
            return fn(tensor)

        return super()._apply(keep_wide, recurse)


def float32_zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


class TimestepNorm(Float32Module):
    """y_t = (x_t - mean_t) / sqrt(var_t + eps) * (weight + 1) + bias.

    mean_t and var_t are over all numbers of the channel's group in steps 1..t (section 3.2).
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_groups, self.eps = config.norm_num_groups, config.norm_eps
        self.weight = float32_zeros(config.hidden_size)
        self.bias = float32_zeros(config.hidden_size)

    def forward(
        self, x: Tensor, span: Span, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [batch, length, D] and (mean, var) float64 [batch, G] before it to the same after."""
        groups = at_least_float32(x).unflatten(-1, (self.num_groups, -1))
        if state is None:
            state = (groups.new_zeros(len(x), self.num_groups, dtype=torch.float64),) * 2
        mean_before, var_before = state
        before = span.seen[:, None].double()
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)
        count = (span.seen[:, None] + steps)[..., None].double()

        # Sums are taken about a value near the data, a constant to the gradients, so that neither a
        # large mean nor the length costs digits.
        first = groups[:, 0].mean(-1).double()
        shift = torch.where(before > 0, mean_before, first).to(groups.dtype).detach()
        about = groups - shift[:, None, :, None]
        step_var, step_mean = torch.var_mean(about, dim=-1, correction=0)
        step_var, step_mean = step_var.double(), step_mean.double()
        shift = shift.double()
        sum1 = before * (mean_before - shift)
        sum2 = before * (var_before + (mean_before - shift).square())
        offset = (sum1[:, None] + step_mean.cumsum(1)) / count
        var = (sum2[:, None] + (step_var + step_mean.square()).cumsum(1)) / count
        var = (var - offset.square()).clamp_min(0)
        mean = shift[:, None] + offset

        rstd = (var + self.eps).rsqrt().to(groups.dtype)[..., None]
        # The mean in two parts: its rounding would show where it is far larger than the deviation.
        high = mean.detach().to(groups.dtype)
        low = (mean - high).to(groups.dtype)[..., None]
        normed = torch.addcmul(-low * rstd, groups - high[..., None], rstd).flatten(2)
        y = torch.addcmul(self.bias, normed, self.weight + 1).to(x.dtype)
        if span.kept is None:
            return y, None
        mean = torch.cat([mean_before[:, None], mean], dim=1)
        var = torch.cat([var_before[:, None], var], dim=1)
        return y, (after(mean, span.lengths), after(var, span.lengths))


class RMSNorm(Float32Module):
    """x / rms(x) * (weight + 1) over the last dimension."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = float32_zeros(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight + 1, self.eps).to(x.dtype)


class LayerNorm(Float32Module):
    """(x - mean(x)) / deviation(x) * (weight + 1) + bias over the last dimension."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = float32_zeros(config.hidden_size)
        self.bias = float32_zeros(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        wide, gain = at_least_float32(x), self.weight + 1
        return F.layer_norm(wide, gain.shape, gain, self.bias, self.eps).to(x.dtype)


class Rescale(Float32Module):
    """A learned factor per channel (released `rescale_nffn`)."""

    def __init__(self, config: MegalodonConfig, layer_index: int) -> None:
        super().__init__()
        self.start = 0.1 * 0.5**layer_index
        self.weight = float32_zeros(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).to(x.dtype)


class QueryKey(Float32Module):
    """Normalizes each head of z, then scales, shifts and rotates it into a query and a key."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.norm_eps
        self.weight = float32_zeros(2, config.z_dim)
        self.bias = float32_zeros(2, config.z_dim)

    def forward(self, z: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """[batch, length, Z] to query and key [batch, length, H, Z/H]."""
        heads = at_least_float32(z).unflatten(-1, (self.num_heads, -1))
        width = heads.shape[-1]
        normed = F.rms_norm(heads, (width,), eps=self.eps)
        scale = ((self.weight + 1) / math.sqrt(width)).unflatten(-1, (-1, width))
        shift = self.bias.unflatten(-1, (-1, width))
        query, key = (torch.addcmul(shift[i], normed, scale[i]) for i in (0, 1))
        return tuple(rotate(part, span).to(z.dtype) for part in (query, key))


def rotate(x: Tensor, span: Span) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) by position * theta^(-2i/width) (arXiv 2104.09864)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * span.cos - odd * span.sin, even * span.sin + odd * span.cos)
    return torch.stack(turned, dim=-1).flatten(-2)


class ComplexEMA(Float32Module):
    """The complex exponential moving average (section 3.1), per channel and n = 1..N:

        p = sigmoid(alpha)
        q = (1 - sigmoid(alpha) sigmoid(delta)) exp(2 pi i n sigmoid(theta) / N)
        h_t = q h_{t-1} + p x_t
        y_t = Re(sum_n gamma_n h_{t,n}) / sqrt(N) + omega x_t

    Steps are taken in blocks of T. Inside a block y is one lower-triangular matrix per channel
    times x; from block to block only the states h go, of which there are length / T.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        channels, ndim = config.hidden_size, config.cema_ndim
        self.alpha = float32_zeros(channels, ndim, 1)
        self.delta = float32_zeros(channels, ndim, 1)
        self.theta = float32_zeros(channels, 1, 1)
        self.gamma = float32_zeros(channels, ndim, 2)
        self.omega = float32_zeros(channels, 1)

    def forward(self, x: Tensor, span: Span, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [batch, length, D] and h before it, complex [batch, D, N], to y and h after it."""
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            if state is None:
                shape = (x.shape[0], x.shape[2], self.alpha.shape[1])
                state = torch.complex(wide.new_zeros(shape), wide.new_zeros(shape))
            short = not exporting() and x.shape[1] <= CEMA_SHORT
            run = self._recurrence if short else self._block_scan
            y, state = run(wide, span, state)
            return y.to(x.dtype), state

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, log|q| and q's phase in turns, float64 [D, N]: powers are taken of q."""
        p, delta = torch.sigmoid(self.alpha.double())[..., 0], self.delta.double()[..., 0]
        # The bound keeps |q| from being zero, of which there is no logarithm.
        log_magnitude = torch.log1p(-(p * torch.sigmoid(delta)).clamp_max(1 - 2**-53))
        ndim = p.shape[1]
        n = torch.arange(1, ndim + 1, device=p.device)
        turns = torch.sigmoid(self.theta.double())[..., 0] * n / ndim
        return p, log_magnitude, turns

    def _readout(self) -> Tensor:
        return torch.view_as_complex(self.gamma.contiguous()) / math.sqrt(self.gamma.shape[1])

    def _recurrence(self, x: Tensor, span: Span, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step by step."""
        p, log_magnitude, turns = self._coefficients()
        # In double precision, because decoding multiplies by q once a token.
        q = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)
        p, readout = p.to(x.dtype), self._readout()
        states, outputs = [h], []
        for x_t in x.unbind(1):
            h = (q * h).to(h.dtype) + p * x_t[..., None]
            states.append(h)
            outputs.append((readout * h).real.sum(-1) + self.omega[:, 0] * x_t)
        y = torch.stack(outputs, dim=1)
        return y, None if span.kept is None else after(torch.stack(states, dim=1), span.lengths)

    def _block_scan(self, x: Tensor, span: Span, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """By blocks of T steps; K of them, the last one filled up with zeros."""
        batch, length, _ = x.shape
        size = CEMA_BLOCK if exporting() else min(CEMA_BLOCK, length)
        # torch.export would ask for lengths of more than one block: the dimension must not be 1.
        count = -(-length // size) + exporting()
        p, log_magnitude, turns = self._coefficients()
        exponents = torch.arange(size + 1, device=x.device)[:, None]
        phase = exponents * turns[:, None]
        powers = torch.polar(
            (exponents * log_magnitude[:, None]).to(x.dtype).exp(),
            2 * math.pi * (phase - phase.detach().round()).to(x.dtype),
        )  # q^0..q^T [D, T+1, N]
        p = p.to(x.dtype)[:, None]
        readout = self._readout()[:, None] * powers

        # Within the blocks: y_i = sum_{j<=i} taps_{i-j} x_j.
        blocks = F.pad(x, (0, 0, 0, count * size - length)).unflatten(1, (count, size))
        blocks = blocks.permute(3, 0, 1, 2).flatten(1, 2).contiguous()  # [D, batch * K, T]
        taps = (p * readout.real)[:, :size].sum(-1)
        taps = torch.cat([taps[:, :1] + self.omega, taps[:, 1:]], dim=1)
        within = F.pad(taps.flip(1), (0, size - 1)).unfold(1, size, 1).flip(1)  # [D, T, T]
        y = torch.bmm(blocks, within.mT)

        # From block to block: h' = q^T h + sum_j q^{T-1-j} p x_j, in double precision.
        write = torch.view_as_real((p * powers[:, :size]).flip(1)).flatten(2)  # [D, T, 2N]
        written = as_complex(torch.bmm(blocks, write)).unflatten(1, (batch, count))
        state = h.transpose(0, 1).to(torch.complex128)
        scan = scan_by_fft if torch.compiler.is_compiling() else scan_by_steps
        states = scan(size * log_magnitude, phase[:, size], state, written).to(h.dtype)
        before = states[:, :, :-1]  # [D, batch, K, N]

        # What the states add: Re(readout_{i+1} h) = Re(readout) Re(h) - Im(readout) Im(h).
        response = torch.view_as_real(readout[:, 1:].conj().resolve_conj()).flatten(2)  # [D, T, 2N]
        y = y + torch.bmm(torch.view_as_real(before).flatten(3).flatten(1, 2), response.mT)
        if y.requires_grad and not torch.compiler.is_compiling():
            # Both products' backward passes would otherwise copy the transposed gradient.
            y.register_hook(Tensor.contiguous)
        y = y.unflatten(1, (batch, count)).permute(1, 2, 3, 0).flatten(1, 2)[:, :length]
        if span.kept is None:
            return y, None

        # The state after a row's last step: from the block that the row ends in, of which
        # `steps` belong to the row; they are shifted to the block's end.
        states = states.permute(1, 2, 0, 3)
        block, steps = span.lengths // size, span.lengths % size
        source = span.lengths[:, None] + torch.arange(-size, 0, device=x.device)
        own = source >= (block * size)[:, None]
        last = x[torch.arange(batch, device=x.device)[:, None], source.clamp_min(0)]
        last = torch.where(own[..., None], last, 0).permute(2, 0, 1)
        h = powers[:, steps].transpose(0, 1) * after(states, block)
        return y, h + as_complex(torch.bmm(last, write)).transpose(0, 1)


def scan_by_steps(log_magnitude: Tensor, turns: Tensor, state: Tensor, written: Tensor) -> Tensor:
    """The states before each block and after the last, complex [D, batch, K + 1, N].

    Args:
        log_magnitude: of what a block multiplies a state by, float64 [D, N]; and
        turns: its phase.
        state: before the first block, [D, batch, N].
        written: what each block adds, [D, batch, K, N].
    """
    decay = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)[:, None]
    states = [state]
    for written_by_block in written.unbind(2):
        states.append(decay * states[-1] + written_by_block)
    return torch.stack(states, dim=2)


def scan_by_fft(log_magnitude: Tensor, turns: Tensor, state: Tensor, written: Tensor) -> Tensor:
    """The same as one convolution, for a graph that has to fit any number of blocks."""
    terms = torch.cat([state[:, :, None], written], dim=2)
    count = terms.shape[2]
    power = torch.arange(count, device=terms.device)[:, None]
    magnitude, turns = (power * log_magnitude[:, None]).exp(), power * turns[:, None]
    powers = torch.polar(magnitude, 2 * math.pi * turns)[:, None]  # [D, 1, K + 1, N]
    product = torch.fft.fft(terms, 2 * count, dim=2) * torch.fft.fft(powers, 2 * count, dim=2)
    return torch.fft.ifft(product, dim=2)[:, :, :count]


def exporting() -> bool:
    """Whether torch.export traces the model, so that nothing may depend on the length."""
    return torch.compiler.is_compiling() and torch.compiler.is_exporting()


def as_complex(pairs: Tensor) -> Tensor:
    """[..., 2N] real and imaginary parts in turn to complex [..., N]."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention of [batch, steps, H, width], causal where there is no mask."""
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0
    )
    return out.transpose(1, 2)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, dropout: float) -> Tensor:
    """Causal attention inside chunks, of rows that all start at the start of a chunk."""
    length = q.shape[1]
    if torch.compiler.is_compiling():
        size = chunk_size if exporting() else min(chunk_size, length)
        count = -(-length // size) + exporting()
        padded = (F.pad(z, (0, 0, 0, 0, 0, count * size - length)) for z in (q, k, v))
        chunks = (z.unflatten(1, (count, size)).flatten(0, 1) for z in padded)
        out = attend(*chunks, None, dropout)
        return out.unflatten(0, (-1, count)).flatten(1, 2)[:, :length]
    whole = length - length % chunk_size
    outputs = []
    if whole:
        chunks = (z[:, :whole].unflatten(1, (-1, chunk_size)).flatten(0, 1) for z in (q, k, v))
        out = attend(*chunks, None, dropout)
        outputs.append(out.unflatten(0, (len(q), -1)).flatten(1, 2))
    if whole < length:
        outputs.append(attend(*(z[:, whole:] for z in (q, k, v)), None, dropout))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class FeedForward(nn.Module):
    """(silu(u W1) * (u W3)) W2, or silu(u W1) W2 without SwiGLU, and the optional rescaling."""

    def __init__(self, config: MegalodonConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False) if config.swiglu else None
        self.rescale = Rescale(config, layer_index) if config.rescale_nffn else None

    def forward(self, u: Tensor) -> Tensor:
        hidden = F.silu(self.w1(u))
        if self.w3 is not None:
            hidden = hidden * self.w3(u)
        output = self.w2(F.dropout(hidden, self.config.hidden_dropout, self.training))
        output = F.dropout(output, self.config.dropout, self.training)
        return output if self.rescale is None else self.rescale(output)


class MegalodonDecoderLayer(GradientCheckpointingLayer):
    """One block; see the top of this file."""

    def __init__(self, config: MegalodonConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.timestep_norm = TimestepNorm(config)
        self.cema = ComplexEMA(config)
        self.cema_norm = RMSNorm(config)
        self.wz = nn.Linear(width, config.z_dim)
        self.query_key = QueryKey(config)
        self.wv = nn.Linear(width, config.value_dim)
        self.wr = nn.Linear(width, config.value_dim)
        self.wh1 = nn.Linear(width, width)
        self.wh2 = nn.Linear(config.value_dim, width, bias=False)
        self.ffn_norm = LayerNorm(config)
        self.ffn = FeedForward(config, layer_index)

    def forward(
        self, x: Tensor, span: Span, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """x [batch, length, D] and the state before it to the output and the state after it."""
        config = self.config
        t, norm_state = self.timestep_norm(x, span, state and state[:2])
        m, cema_state = self.cema(t, span, state and state.cema)
        m = F.dropout(self.cema_norm(m), config.hidden_dropout, self.training)

        q, k = self.query_key(self.wz(m), span)
        v = F.silu(self.wv(t)).unflatten(-1, (config.num_attention_heads, -1))
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
        dropout = config.attention_dropout if self.training else 0.0
        if span.mask is None:
            a = chunked_attention(q, k, v, config.chunk_size, dropout)
        else:
            a = attend(q, k, v, span.mask, dropout)
        gated = a.flatten(2) * F.silu(self.wr(m))
        update = self.wh1(m) + self.wh2(F.dropout(gated, config.hidden_dropout, self.training))
        y = x + F.dropout(update, config.dropout, self.training)
        output = x + self.ffn(self.ffn_norm(y))

        if span.kept is None:
            return output, None
        return output, LayerState(*norm_state, cema_state, keep(k, span.kept), keep(v, span.kept))


class MegalodonPreTrainedModel(PreTrainedModel):
    config_class = MegalodonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegalodonDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["cema", "norm", "query_key", "rescale"]
    _supports_sdpa = True
    # Steps cannot be taken back; generation then refuses what would have to.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The released initializers."""
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            std = 1 / math.sqrt(self.config.hidden_size)
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / math.sqrt(3 * module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Rescale):
            init.constant_(module.weight, module.start)
        elif isinstance(module, ComplexEMA):
            init.normal_(module.alpha, std=0.2)
            init.normal_(module.delta, std=0.2)
            channels = len(module.theta)
            steps = torch.randperm(channels) + 1
            frequency = torch.exp(-math.log(channels) / channels * steps.double())
            # The clamp is for a single channel, whose frequency 1 has an infinite logit.
            init.copy_(module.theta, torch.logit(frequency, eps=1e-7).view(-1, 1, 1))
            init.copy_(module.gamma, F.pad(torch.randn(*module.gamma.shape[:2], 1), (0, 1)))
            init.trunc_normal_(module.omega, std=0.25, a=-1.0, b=1.0)
        elif isinstance(module, Float32Module):
            for parameter in module.parameters():
                init.zeros_(parameter)


class MegalodonModel(MegalodonPreTrainedModel):
    """Embedding, blocks and final TimestepNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MegalodonDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = TimestepNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        positions_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **others: object,
    ) -> BaseModelOutputWithPast:
        """Runs or continues sequences.

        Args:
            input_ids: int64 [batch, length]; or
            inputs_embeds: [batch, length, D], before scale_embedding.
            attention_mask: [batch, length], or longer with what the cache has seen in front. Zeros
                mark padding, wherever it is; a row gets what it would get without it, and zeros
                at the padding.
            past_key_values: the cache that an earlier call returned.
            use_cache: whether to return one; config.use_cache, and False in training, if left out.
            output_hidden_states: return the embedding and each block's output too, the last one
                after the final norm; the input is then not cut into pieces.
            positions_to_keep: return the hidden states of the last so many columns (0: of all), or
                of the columns with these numbers.
            position_ids: follow from the rest; looked at only to refuse packed samples.
            **others: marks of packed samples, which are refused; the rest is ignored.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        batch, length = inputs.shape[:2]
        if length == 0:
            raise ValueError("input_ids is empty; give at least one token.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = MegalodonCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._check_cache(cache, batch)

        real = self._real_steps(attention_mask, length)
        refuse_packing(position_ids, real, inputs, others)

        # Real steps go to the front of their rows; `step` says where each column's went.
        compiling = torch.compiler.is_compiling()
        lengths, longest = None, length
        step = torch.arange(length, device=inputs.device).expand(batch, -1)
        if real is not None:
            order = real.long().argsort(dim=1, descending=True, stable=True)
            inputs = inputs[torch.arange(batch, device=inputs.device)[:, None], order]
            lengths = real.sum(1)
            step = torch.where(real, real.cumsum(1) - 1, -1)
            if not compiling or cache is not None:
                lengths = lengths.cpu()
                longest = max(1, int(lengths.max()))

        bounds = [0, longest]
        cuts = cache is not None and not torch.is_grad_enabled() and not output_hidden_states
        if cuts and not compiling:
            piece = self.config.piece_length
            first = piece if cache.steps_seen is None else piece - int(cache.steps_seen[0]) % piece
            bounds = [0, *range(first, longest, piece), longest]
        if isinstance(positions_to_keep, int):
            positions_to_keep = slice(-positions_to_keep, None)
        kept_step, output = step[:, positions_to_keep], None
        hidden_states = [] if output_hidden_states else None
        for start, stop in pairwise(bounds):
            own_lengths = None if lengths is None else (lengths - start).clamp(0, stop - start)
            x = self._run(inputs[:, start:stop], own_lengths, cache, hidden_states)
            if real is None and len(bounds) == 2:
                output = x[:, positions_to_keep]
            else:
                output = put_back(x, kept_step - start, output)
        if output_hidden_states:
            hidden_states = tuple(put_back(x, step) for x in hidden_states)
        if cache is not None:
            cache.length += length
        return BaseModelOutputWithPast(
            last_hidden_state=output, past_key_values=cache, hidden_states=hidden_states
        )

    def _run(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        cache: MegalodonCache | None,
        hidden_states: list[Tensor] | None,
    ) -> Tensor:
        """One piece, real steps first; updates the cache and appends to hidden_states.

        Of lengths, those of the rows, there are none where nothing is padded.
        """
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None]
            x = x.masked_fill(padding[..., None], 0)
        x = F.dropout(x, self.config.dropout, self.training)

        seen = None if cache is None else cache.steps_seen
        if cache is None or (seen is None and lengths is None):
            span = first_span(self.config, lengths, x, cache is not None)
        else:
            lengths = (
                torch.full((len(x),), x.shape[1], device="cpu") if lengths is None else lengths
            )
            seen = torch.zeros_like(lengths) if seen is None else seen
            span = make_span(self.config, seen, lengths, x, True)
        for index, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(x)
            x, state = layer(x, span, None if cache is None else cache.layer_states[index])
            if cache is not None:
                cache.layer_states[index] = state
        x, state = self.norm(x, span, None if cache is None else cache.final_norm)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            steps = torch.full((len(x),), x.shape[1], device="cpu") if lengths is None else lengths
            cache.steps_seen = steps if seen is None else seen + steps
            cache.final_norm = state
        return x

    def _check_cache(self, cache: MegalodonCache | None, batch: int) -> None:
        if cache is None:
            return
        if not isinstance(cache, MegalodonCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; Megalodon takes the MegalodonCache "
                "that a call with use_cache=True returns."
            )
        if cache.steps_seen is not None and len(cache.steps_seen) != batch:
            raise ValueError(
                f"The input has {batch} rows and past_key_values {len(cache.steps_seen)}; give as "
                "many rows as the cache holds."
            )

    def _real_steps(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Which steps are no padding, bool [batch, length]; None if all are (no graph asks)."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it takes zeros and ones "
                f"[batch, {length}], or more columns for what the cache has seen."
            )
        mask = attention_mask[:, -length:]
        real = mask.bool()
        require(
            (mask == real).all(),
            "attention_mask has numbers other than 0 and 1; it takes ones for a row's one sample "
            "and zeros for padding.",
        )
        return None if not torch.compiler.is_compiling() and real.all() else real


def refuse_packing(
    position_ids: Tensor | None, real: Tensor | None, inputs: Tensor, others: dict
) -> None:
    """Refuses rows of several samples, whose averages and attention would run across them.

    Raises:
        ValueError: something says that there are such rows; one sentence names it.
    """
    advice = "give every sample a row of its own, padded with zeros in attention_mask."
    for name in PACKING:
        if others.get(name) is not None:
            raise ValueError(
                f"{name} is given, but Megalodon cannot keep packed samples apart; {advice}"
            )
    if position_ids is None:
        return
    batch, length = inputs.shape[:2]
    column = torch.arange(length, device=inputs.device).expand(batch, -1)
    real = torch.ones_like(column, dtype=torch.bool) if real is None else real
    constant = torch.zeros((batch,), dtype=torch.bool, device=inputs.device)
    # Positions count a row's real steps or its columns, from any number on.
    for count in (real.cumsum(1), column):
        offset = position_ids - count
        least = offset.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1)
        most = offset.masked_fill(~real, torch.iinfo(torch.int64).min).amax(1)
        constant = constant | (least >= most)
    require(
        constant.all(),
        "position_ids restart or jump in a row, but Megalodon cannot keep packed samples apart; "
        + advice,
    )


def require(condition: Tensor, sentence: str) -> None:
    """Raises a ValueError with the sentence, in a compiled graph a RuntimeError, if it is false."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, sentence)
    elif not condition:
        raise ValueError(sentence)


def put_back(x: Tensor, step: Tensor, output: Tensor | None = None) -> Tensor:
    """x[b, step[b, c]] for every column c whose step is in x; the rest is output's, or zero."""
    step = step.to(x.device)
    here = (step >= 0) & (step < x.shape[1])
    found = x.take_along_dim(step.clamp(0, x.shape[1] - 1)[..., None], dim=1)
    return torch.where(here[..., None], found, 0 if output is None else output)


class MegalodonForCausalLM(MegalodonPreTrainedModel, GenerationMixin):
    """A Megalodon with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.model = MegalodonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **loss_arguments: object,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, length, vocab_size], or of the columns that logits_to_keep asks for.

        Args as for MegalodonModel, and labels int64 [batch, length] for the loss of each next
        token; -100 is left out.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            positions_to_keep=logits_to_keep,
            position_ids=position_ids,
            return_dict=True,
            **{name: loss_arguments.pop(name) for name in PACKING if name in loss_arguments},
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: object
    ) -> None:
        """What `generate` calls for a cache: Megalodon has one kind."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; Megalodon's "
                "cache is of constant size as it is, so leave it out."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MegalodonCache(self.config)

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Refuses continuous batching.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch pages keys and values, but Megalodon has running averages beside them; "
            "call generate with a batch padded on the left."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


__all__ = ["MegalodonCache", "MegalodonForCausalLM", "MegalodonModel", "MegalodonPreTrainedModel"]
