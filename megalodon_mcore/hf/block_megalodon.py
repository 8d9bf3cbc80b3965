"""One Megalodon block.

Shapes are written [batch, length, ...]. D is hidden_size, N cema_ndim, G norm_num_groups, C
chunk_size, H the heads, Z z_dim and E value_dim. A block computes

    t = TimestepNorm(x)                      m = RMSNorm(CEMA(t))
    z = RMSNorm_per_head(m Wz + bz)          q, k = z * (w + 1) / sqrt(Z/H) + b, each its own w, b
    v = silu(t Wv + bv)                      r = silu(m Wr + br)
    a = causal attention inside chunks of C positions of (rope(q), rope(k), v)
    y = x + (m Wh1 + bh1) + (a * r) Wh2
    out = x + FFN(LayerNorm(y)),  FFN(u) = (silu(u W1) * (u W3)) W2, or silu(u W1) W2

so that all it has to remember of a sequence, however long, are the running mean and variance of
TimestepNorm, the state of CEMA, and the keys and values of the chunk it is in. The FFN may be made
of experts, which layers_megalodon.py has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_megalodon import in_place, set_rows, set_state
from .configuration_megalodon import MegalodonConfig
from .layers_megalodon import (
    Place,
    at_least_float32,
    experts_of,
    mixture,
    never_narrow,
)

try:
    # With Triton kernels for a GPU; without this package the operators below do the same.
    from megalodon_mcore import kernels
    from megalodon_mcore.kernels import (  # noqa: F401
        cema,
        chunked_attention,
        gates,
        query_key,
        row_norm,
        segments,
        timestep_norm,
    )
except ImportError:
    kernels = None

CEMA_BLOCK = 64


class Span(NamedTuple):
    """Where a piece of steps lies in its rows; the same for every block.

    In a row the real steps come first and padding follows, so that causality alone keeps padding
    out of the results and only the states have to know where a row ends.
    """

    seen: Tensor  # int64 [batch]: real steps before the piece
    lengths: Tensor  # int64 [batch]: real steps in it
    cos: Tensor  # [batch or 1, length, 1, Z/H/2], the rotations' angles
    sin: Tensor
    # bool [batch or 1, 1, length, keys]: for a single step of the cached keys, its own among them,
    # else of the cached and the new ones; None where all rows are at a chunk's start.
    mask: Tensor | None
    # Where `kernels` do the work: the rows' samples and padding, as they take them; those of them
    # that are no padding, and their numbers.
    segments: segments.Segments | None = None
    real: segments.Segments | None = None
    numbers: list[int] | None = None
    # What attention layers go by, where the model has any.
    place: Place | None = None


def make_span(
    config: MegalodonConfig,
    seen: Tensor,
    lengths: Tensor | None,
    like: Tensor,
    cached: bool,
    starts: list[int] | None,
    documents: list[list[int]] | None = None,
) -> Span:
    """The span of `like` [batch, length, D].

    Args:
        config: the model's.
        seen: int64 [batch].
        lengths: int64 [batch]; None where nothing is padded.
        like: the input.
        cached: whether there are states to be updated.
        starts: what `seen` holds; None where nobody has looked.
        documents: of each row where its samples start, and its length; None for one a row.
    """
    length, chunk_size, device = like.shape[1], config.chunk_size, like.device
    usable = kernels is not None and not torch.compiler.is_compiling() and starts is not None
    if usable and not (cached and length == 1):
        tables = make_segments(length, starts, lengths, documents)
        if lengths is None:
            lengths = torch.full_like(seen, length)
        return Span(seen, lengths, None, None, None, *tables)
    start = starts[0] if starts and len(set(starts)) == 1 else None
    fill = seen % chunk_size if start is None else seen.new_full((1,), start % chunk_size)
    # Positions count from the start of the chunk a row is in.
    position = fill[:, None] + torch.arange(length, device=device)
    pairs = torch.arange(config.z_dim // config.num_attention_heads // 2, device=device)
    frequency = config.rope_theta ** (-pairs.double() / len(pairs))
    angle = ((position % chunk_size)[..., None] * frequency)[:, :, None]
    cos, sin = (z.to(at_least_float32(like).dtype) for z in (angle.cos(), angle.sin()))

    mask, slots = None, torch.arange(chunk_size, device=device)
    if cached and length == 1:
        mask = (slots <= fill[:, None])[:, None, None]
    elif start is None or start % chunk_size:
        # A slot that is not yet filled is in no query's chunk.
        slots = torch.where(slots < fill[:, None], slots, -1)
        key_position = torch.cat([slots, position], dim=1)
        key, query = key_position[:, None, None, :], position[:, None, :, None]
        mask = (key <= query) & (key // chunk_size == query // chunk_size)
    if lengths is None:
        lengths = torch.full_like(seen, length)
    return Span(seen, lengths, cos, sin, mask)


def make_segments(
    length: int, starts: list[int], lengths: Tensor | None, documents: list[list[int]] | None
) -> tuple[segments.Segments, segments.Segments, list[int]]:
    """A span's tables for `kernels`, of rows of `length` steps.

    Arguments as make_span's; padding follows a row's real steps, as a sample of its own.
    """
    own = kernels.segments
    if documents is not None:
        table = own.Segments.of_documents(documents)
        return table, table, list(range(len(table)))
    rows = [length] * len(starts) if lengths is None else lengths.tolist()
    found, real = [], []
    for row, (start, steps) in enumerate(zip(starts, rows, strict=True)):
        if steps:
            real.append(len(found))
            found.append(own.Segment(row, 0, steps, start))
        if steps < length:
            found.append(own.Segment(row, steps, length - steps, 0))
    table = own.Segments(length, len(starts), found)
    return table, table.take(real), real


def at_row_ends(steps: Tensor, lengths: Tensor) -> Tensor:
    """steps[b, lengths[b]] of [batch, length + 1, ...]: what holds after a row's last step."""
    return steps[torch.arange(len(steps), device=steps.device), lengths]


def by_kernels(x: Tensor) -> bool:
    """Whether what depends on no other step goes by `kernels`, too."""
    return kernels is not None and x.shape[1] > 1 and not torch.compiler.is_compiling()


def runs_samples_apart() -> bool:
    """Whether packed samples go one after another, since nothing here takes them side by side."""
    return kernels is None


class Float32Module(nn.Module):
    """Keeps its parameters in float32 when the model is cast to a narrower type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        return super()._apply(never_narrow(fn), recurse)


def float32_zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


class TimestepNorm(Float32Module):
    """y_t = (x_t - mean_t) / sqrt(var_t + eps) * (weight + 1) + bias.

    mean_t and var_t are over all numbers of the channel's group in steps 1..t (section 3.2).
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_groups, self.eps = cast(int, config.norm_num_groups), config.norm_eps
        self.weight = float32_zeros(config.hidden_size)
        self.bias = float32_zeros(config.hidden_size)

    def new_state(self, rows: Tensor, *_: object) -> dict[str, Tensor]:
        """Of a batch such as `rows` [batch, ...], which has read nothing: mean and var."""
        shape = (len(rows), self.num_groups)
        return {name: rows.new_zeros(shape, dtype=torch.float64) for name in ("mean", "var")}

    def forward(self, x: Tensor, span: Span, state: dict | None) -> Tensor:
        """[batch, length, D] to the same; the state's mean and var become those after it."""
        if state is not None and x.shape[1] == 1:
            return self._step(x[:, 0], span, state)[:, None]
        if span.segments is not None:
            return self._by_kernels(x.transpose(0, 1), span, state).transpose(0, 1)
        groups = at_least_float32(x).unflatten(-1, (self.num_groups, -1))
        none = groups.new_zeros(len(x), self.num_groups, dtype=torch.float64)
        mean_before, var_before = (none, none) if state is None else (state["mean"], state["var"])
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
        if state is not None:
            for name, now in (("mean", mean), ("var", var)):
                steps = torch.cat([state[name][:, None], now], dim=1)
                set_state(state, name, at_row_ends(steps, span.lengths))
        return torch.addcmul(self.bias, normed, self.weight + 1).to(x.dtype)

    def _step(self, x: Tensor, span: Span, state: dict) -> Tensor:
        """[batch, D]: the running mean moves by the step's share of all there is."""
        groups = x.double().unflatten(-1, (self.num_groups, -1))
        step_var, step_mean = torch.var_mean(groups, dim=-1, correction=0)
        count = (span.seen + span.lengths).clamp_min(1)
        share = (span.lengths / count.double())[:, None]
        mean, var = joined_statistics(state["mean"], state["var"], step_mean, step_var, share)
        set_state(state, "mean", mean)
        set_state(state, "var", var)
        normed = (groups - mean[..., None]) * (var + self.eps).rsqrt()[..., None]
        normed = normed.flatten(1).to(self.bias.dtype)
        return torch.addcmul(self.bias, normed, self.weight + 1).to(x.dtype)

    def _by_kernels(self, x: Tensor, span: Span, state: dict | None) -> Tensor:
        """Of [length, batch, D]."""
        own, before = kernels.timestep_norm, None
        if state is not None:
            rows = span.segments.tensor("row", x.device)
            before = own.TimestepNormState(state["mean"][rows], state["var"][rows])
        arguments = (self.weight, self.bias, self.num_groups, self.eps, span.segments, before)
        y, _ = own.timestep_norm(x, *arguments)
        if state is not None:
            rows = span.real.tensor("row", x.device)
            held = state["mean"][rows], state["var"][rows]
            mean, var = self.statistics_after(x, span.real, *held)
            set_rows(state, "mean", rows, mean)
            set_rows(state, "var", rows, var)
        return y

    def statistics_after(
        self, x: Tensor, table: segments.Segments, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64 [S, G], after x [length, batch, D], by those before it.

        In float64, where the state that the operator returns may be narrower. What a segment that
        starts afresh is given counts for nothing.
        """
        more = kernels.timestep_norm.timestep_statistics(x, self.num_groups, table)
        length, position = (table.tensor(name, x.device) for name in ("length", "position"))
        share = (length / (position + length).double())[:, None]
        fresh = (position == 0)[:, None]
        mean, var = mean.masked_fill(fresh, 0), var.masked_fill(fresh, 0)
        return joined_statistics(mean, var, *more, share=share)


def joined_statistics(
    mean: Tensor, var: Tensor, more_mean: Tensor, more_var: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of steps and of more, which are `share` of all, by those of either."""
    off = more_mean - mean
    joined = torch.addcmul(more_var, off * (1 - share), off)
    return torch.addcmul(mean, off, share), var.lerp(joined, share)


class RMSNorm(Float32Module):
    """x / rms(x) * (weight + 1) over the last dimension."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = float32_zeros(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if by_kernels(x):
            return kernels.row_norm.rms_norm(x, self.weight, self.eps)
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
        if by_kernels(x):
            return kernels.row_norm.layer_norm(x, self.weight, self.bias, self.eps)
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
        self.rotation = float(config.rope_theta), config.chunk_size
        self.weight = float32_zeros(2, config.z_dim)
        self.bias = float32_zeros(2, config.z_dim)

    def forward(self, z: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """[batch, length, Z] to query and key [batch, length, H, Z/H]."""
        if span.segments is not None:
            heads = z.transpose(0, 1).unflatten(-1, (self.num_heads, -1))
            arguments = (self.weight, self.bias, self.eps, *self.rotation, span.segments)
            query, key = kernels.query_key.query_key(heads, *arguments)
            return query.transpose(0, 1), key.transpose(0, 1)
        heads = at_least_float32(z).unflatten(-1, (self.num_heads, -1))
        width = heads.shape[-1]
        normed = F.rms_norm(heads, (width,), eps=self.eps)
        scale = ((self.weight + 1) / math.sqrt(width)).unflatten(-1, (-1, width))
        shift = self.bias.unflatten(-1, (-1, width))
        query, key = (rotate(torch.addcmul(shift[i], normed, scale[i]), span) for i in (0, 1))
        return query.to(z.dtype), key.to(z.dtype)


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

    def forward(self, x: Tensor, span: Span, state: dict | None) -> Tensor:
        """[batch, length, D] to the same; the state's h becomes that after it."""
        with torch.autocast(x.device.type, enabled=False):
            if state is not None and "step" not in state and not torch.is_grad_enabled():
                # Once a sequence, not once a token.
                state["step"] = self._step_weights()
            wide = at_least_float32(x)
            if state is not None and x.shape[1] == 1:
                return self._step(wide[:, 0], span, state)[:, None].to(x.dtype)
            h = None if state is None else torch.view_as_complex(state["cema"])
            if span.segments is not None:
                return self._by_kernels(x.transpose(0, 1), span, h, state).transpose(0, 1)
            y, h = self._block_scan(wide, span, h)
            if state is not None:
                set_state(state, "cema", torch.view_as_real(h))
            return y.to(x.dtype)

    def _by_kernels(self, x: Tensor, span: Span, h: Tensor | None, state: dict | None) -> Tensor:
        """Of [length, batch, D]."""
        weights = (self.alpha, self.delta, self.theta, self.gamma, self.omega)
        if h is not None:
            h = h[span.segments.tensor("row", x.device)]
        y, h = kernels.cema.cema(x, *weights, span.segments, h, return_state=state is not None)
        if state is not None:
            rows = span.real.tensor("row", x.device)
            set_rows(state, "cema", rows, torch.view_as_real(h)[span.numbers])
        return y

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

    def _step_weights(self) -> tuple[Tensor, ...]:
        """q's real part and what turns h's parts round, p beside 0, the readout: [D, N, 2]."""
        p, log_magnitude, turns = self._coefficients()
        # In double precision, because decoding multiplies by q once a token.
        magnitude, phase = log_magnitude.exp(), 2 * math.pi * turns
        real, imaginary = magnitude * phase.cos(), magnitude * phase.sin()
        readout = torch.view_as_real(self._readout().conj().resolve_conj())
        drive = torch.stack([p, torch.zeros_like(p)], dim=-1).to(readout.dtype)
        pairs = (torch.stack([real, real], dim=-1), torch.stack([-imaginary, imaginary], dim=-1))
        return *pairs, drive, readout

    def _step(self, x: Tensor, span: Span, state: dict) -> Tensor:
        """[batch, D], in real numbers, which compilers know better than complex ones."""
        weights = self._step_weights() if torch.is_grad_enabled() else state["step"]
        real, imaginary, drive, readout = weights
        before = state["cema"]
        h = (before * real).addcmul(before.flip(-1), imaginary).to(before.dtype)
        h = h.addcmul(drive, x[..., None, None])
        set_state(state, "cema", torch.where(span.lengths[:, None, None, None] > 0, h, before))
        return torch.addcmul((h * readout).flatten(2).sum(-1), self.omega[:, 0], x)

    def _block_scan(self, x: Tensor, span: Span, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """By blocks of T steps; K of them, the last one filled up with zeros."""
        batch, length, channels = x.shape
        cached = h is not None
        if h is None:
            h = torch.view_as_complex(x.new_zeros(batch, channels, self.alpha.shape[1], 2))
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
        if not cached:
            return y, None

        # The state after a row's last step: from the block that the row ends in, of which
        # `steps` belong to the row; they are shifted to the block's end.
        states = states.permute(1, 2, 0, 3)
        block, steps = span.lengths // size, span.lengths % size
        source = span.lengths[:, None] + torch.arange(-size, 0, device=x.device)
        own = source >= (block * size)[:, None]
        last = x[torch.arange(batch, device=x.device)[:, None], source.clamp_min(0)]
        last = torch.where(own[..., None], last, 0).permute(2, 0, 1)
        h = powers[:, steps].transpose(0, 1) * at_row_ends(states, block)
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


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, dropout: float) -> Tensor:
    """Causal attention inside chunks, of rows that all start at the start of a chunk."""
    length = q.shape[1]
    size = chunk_size if exporting() else min(chunk_size, length)
    count = -(-length // size) + exporting()
    padded = (F.pad(z, (0, 0, 0, 0, 0, count * size - length)) for z in (q, k, v))
    chunks = (z.unflatten(1, (count, size)).flatten(0, 1) for z in padded)
    out = attend(*chunks, mask=None, dropout=dropout)
    return out.unflatten(0, (-1, count)).flatten(1, 2)[:, :length]


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, span: Span, state: dict, dropout: float
) -> Tensor:
    """Attends from single steps [batch, 1, H, width], whose keys and values go to their slots."""
    chunk_size = state["keys"].shape[2]
    slot = (span.seen % chunk_size)[:, None, None, None]
    for name, new in (("keys", k), ("values", v)):
        held, new = state[name], new.transpose(1, 2).to(state[name].dtype)
        write = held.scatter_ if in_place(held) else held.scatter
        state[name] = write(2, slot.expand_as(new), new)
    logits = at_least_float32(q.transpose(1, 2) @ state["keys"].to(q.dtype).mT)
    weights = logits.masked_fill(~span.mask, -math.inf).softmax(-1)
    weights = F.dropout(weights, dropout, dropout > 0).to(v.dtype)
    return (weights @ state["values"].to(v.dtype)).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, span: Span, state: dict | None, chunk_size: int, dropout: float
) -> Tensor:
    """Causal attention inside chunks of [batch, length, H, width]; updates keys and values."""
    if state is not None and q.shape[1] == 1:
        return attention_step(q, k, v, span, state, dropout)
    held = [] if state is None else [state["keys"], state["values"]]
    held = [z.transpose(1, 2).to(v.dtype) for z in held]
    if span.segments is not None:
        operator, before = kernels.chunked_attention, None
        if held:
            fills = [(s.row, s.position % chunk_size) for s in span.segments]
            begun = (torch.cat([z[row, :fill] for row, fill in fills]) for z in held)
            before = operator.AttentionState(*begun)
        given = (z.transpose(0, 1) for z in (q, k, v))
        out, _ = operator.chunked_attention(*given, chunk_size, span.segments, before, dropout)
        out = out.transpose(0, 1)
    elif span.mask is None:
        out = attend_in_chunks(q, k, v, chunk_size, dropout)
    else:
        keys, values = (torch.cat(pair, dim=1) for pair in zip(held, (k, v), strict=True))
        out = attend(q, keys, values, span.mask, dropout)
    if state is not None:
        # Slot j holds step `source` of the piece, if the piece has it, or what it held.
        fill = span.seen % chunk_size
        total = fill + span.lengths
        slots = torch.arange(chunk_size, device=q.device)
        source = (total - total % chunk_size - fill)[:, None] + slots
        old, source = (source < 0)[:, None, :, None], source.clamp(0, q.shape[1] - 1)
        for name, new in (("keys", k), ("values", v)):
            new = new.take_along_dim(source[:, :, None, None], dim=1).transpose(1, 2)
            set_state(state, name, torch.where(old, state[name], new.to(state[name].dtype)))
    return out


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    if by_kernels(x) and gate.dtype == x.dtype:
        return kernels.gates.gated_silu(gate, x)
    return F.silu(gate) * x


class FeedForward(nn.Module):
    """(silu(u W1) * (u W3)) W2, or silu(u W1) W2 without SwiGLU, and the optional rescaling.

    Of a block with experts it has the rescaling alone.
    """

    def __init__(self, config: MegalodonConfig, layer_index: int, of_experts: bool = False) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.intermediate_size
        if not of_experts:
            self.w1 = nn.Linear(width, hidden, bias=False)
            self.w2 = nn.Linear(hidden, width, bias=False)
            self.w3 = nn.Linear(width, hidden, bias=False) if config.swiglu else None
        self.rescale = Rescale(config, layer_index) if config.rescale_nffn else None

    def forward(self, u: Tensor) -> Tensor:
        hidden = self.w1(u)
        hidden = F.silu(hidden) if self.w3 is None else gated_silu(hidden, self.w3(u))
        return self.finish(self.w2(F.dropout(hidden, self.config.hidden_dropout, self.training)))

    def finish(self, output: Tensor) -> Tensor:
        """Dropout and the rescaling."""
        output = F.dropout(output, self.config.dropout, self.training)
        return output if self.rescale is None else self.rescale(output)


class MegalodonDecoderLayer(GradientCheckpointingLayer):
    """The block, its FFN made of experts or not."""

    def __init__(
        self, config: MegalodonConfig, layer_index: int, with_experts: bool = False
    ) -> None:
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
        self.ffn = FeedForward(config, layer_index, with_experts)
        self.experts, self.shared_expert = experts_of(config) if with_experts else (None, None)

    def new_state(self, rows: Tensor, dtype: torch.dtype, room: int) -> dict[str, Tensor]:
        """Of a batch such as `rows` [batch, ...], which has read nothing; keys, values of dtype."""
        config, batch = self.config, len(rows)
        averages = at_least_float32(rows).new_zeros(batch, config.hidden_size, config.cema_ndim, 2)
        heads, chunk = config.num_attention_heads, config.chunk_size
        keys, values = (
            rows.new_zeros(batch, heads, chunk, width // heads, dtype=dtype)
            for width in (config.z_dim, config.value_dim)
        )
        state = self.timestep_norm.new_state(rows)
        return state | {"cema": averages, "keys": keys, "values": values}

    def forward(self, x: Tensor, span: Span, state: dict | None = None) -> Tensor:
        """[batch, length, D] to the same; updates the state."""
        config = self.config
        t = self.timestep_norm(x, span, state)
        m = self.cema_norm(self.cema(t, span, state))
        m = F.dropout(m, config.hidden_dropout, self.training)

        q, k = self.query_key(self.wz(m), span)
        v = F.silu(self.wv(t)).unflatten(-1, (config.num_attention_heads, -1))
        dropout = config.attention_dropout if self.training else 0.0
        a = attention(q, k, v, span, state, config.chunk_size, dropout)
        gated = gated_silu(self.wr(m), a.flatten(2))
        update = self.wh1(m) + self.wh2(F.dropout(gated, config.hidden_dropout, self.training))
        y = x + F.dropout(update, config.dropout, self.training)
        u = self.ffn_norm(y)
        if self.experts is None:
            return x + self.ffn(u)
        return x + self.ffn.finish(mixture(self, u))
