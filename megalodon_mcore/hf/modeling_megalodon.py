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

With `layer_symbols` some layers are others: `*`, `-` and `E` compute x + attention, MLP or experts
of norm(x), and `X` is a block with experts for its FFN; layers_megalodon.py has what is in them.
Attention layers remember keys and values of the whole sequence, and so grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_megalodon import MegalodonConfig
from .layers_megalodon import (
    DocumentAttention,
    Experts,
    GatedMLP,
    Place,
    SharedExpert,
    at_least_float32,
    in_place,
    make_place,
    never_narrow,
    projections,
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
# Arguments by which transformers' collators and trainers mark samples packed into one row.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
PACKING = (*CUMULATIVE_LENGTHS, "seq_idx")
RECORDED_STEPS = 64


class Snapshot(NamedTuple):
    """What a cache remembered before some steps, and their embeddings [batch, steps, D]."""

    states: list[dict]  # without attention layers', whose slots are only written behind
    seen: Tensor
    room: int
    steps: Tensor


class MegalodonCache(Cache):
    """All that a Megalodon remembers of a batch of sequences; of blocks it does not grow with them.

    Every tensor has one shape and, without gradients, one place for good: so a decoding step fits
    a CUDA graph. Slots of a row's chunk that it has not reached hold anything. is_compileable asks
    `generate` to compile its steps where transformers does so, on a GPU.

    Attention layers (`*`) keep the keys and values of all steps: theirs grow, a quarter at a time,
    unless max_length, of a row's steps with its padding, makes room once and for all.

    After activate_past_recording `crop` takes back the last steps, as assisted generation wants.
    """

    is_compileable = False

    def __init__(
        self, config: MegalodonConfig, is_compileable: bool = False, max_length: int | None = None
    ) -> None:
        super().__init__(layers=[])
        self.num_layers, self.is_compileable = config.num_hidden_layers, is_compileable
        self.attention = [n for n, z in enumerate(config.symbols) if z == "*"]
        self.max_length = max_length if self.attention else None
        self.recorded_steps = 0
        if self.attention and is_compileable and max_length is None:
            raise ValueError(
                "is_compileable is set, but the model's attention layers (*) keep all steps; give "
                "the cache a max_length, or leave is_compileable out."
            )
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        # Of each layer: mean and var, float64 [batch, G], cema [batch, D, N, 2], keys and values
        # [batch, H, C, Z/H and E/H], and what CEMA's step takes from the parameters; then the final
        # norm's mean and var.
        self.states: list[dict] = []
        # Of attention layers: keys and values [batch, groups, room, width].
        self.room = self.max_length or 0
        self.seen: Tensor | None = None  # int64 [batch], without padding
        self.columns: Tensor | None = None  # int64 [], with padding
        # Oldest first; and embeddings to be fed again before the next piece, since some behind them
        # were taken back.
        self.snapshots: list[Snapshot] = []
        self.again: Tensor | None = None

    def allocate(self, model: MegalodonModel, like: Tensor) -> None:
        """Makes room for a batch such as `like` [batch, length, D]."""
        config, batch, device = model.config, len(like), like.device
        self.seen = like.new_zeros(batch, dtype=torch.int64)
        self.columns = like.new_zeros((), dtype=torch.int64)
        heads, chunk = config.num_attention_heads, config.chunk_size
        dtype = like.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        zeros = torch.zeros
        for layer in (*model.layers, model.norm):
            target = next(layer.parameters()).device
            target = device if target.type == "meta" else target
            state: dict = {}
            norm = layer if layer is model.norm else getattr(layer, "timestep_norm", None)
            if isinstance(norm, TimestepNorm):
                shape = (batch, norm.num_groups)
                for name in ("mean", "var"):
                    state[name] = zeros(shape, dtype=torch.float64, device=target)
            if isinstance(layer, MegalodonDecoderLayer):
                shape = (batch, config.hidden_size, config.cema_ndim, 2)
                averages = zeros(shape, dtype=at_least_float32(like).dtype, device=target)
                keys, values = (
                    zeros(batch, heads, chunk, width // heads, dtype=dtype, device=target)
                    for width in (config.z_dim, config.value_dim)
                )
                state |= {"cema": averages, "keys": keys, "values": values}
            elif layer is not model.norm and layer.attention is not None:
                shape = (batch, config.num_key_value_heads, self.max_length or 0, config.head_dim)
                for name in ("keys", "values"):
                    state[name] = zeros(shape, dtype=dtype, device=target)
            self.states.append(state)
        if not torch.compiler.is_compiling():
            for tensor in (self.seen, self.columns, *(z for s in self.states for z in s.values())):
                torch._dynamo.mark_static_address(tensor)

    def make_room(self, steps: int) -> None:
        """Gives attention layers slots for a piece of so many steps.

        Raises:
            ValueError: max_length is passed.
        """
        if not self.attention:
            return
        if self.max_length is not None:
            require(
                self.seen.max() + steps <= self.max_length,
                f"The cache was made for {self.max_length} steps and is full; make it with a "
                "larger max_length.",
            )
            return
        # What no row is beyond, without a look at the device.
        self.room += steps
        for layer in self.attention:
            state = self.states[layer]
            held = state["keys"].shape[2]
            if held < self.room:
                more = max(self.room - held, held // 4)
                for name in ("keys", "values"):
                    state[name] = F.pad(state[name], (0, 0, 0, more))

    def __len__(self) -> int:
        return self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many steps were fed, padding included."""
        return 0 if self.columns is None else int(self.columns)

    def restart_count(self) -> None:
        """Counts steps from here, for a `generate` that is given only what follows."""
        if self.columns is not None:
            self.columns.zero_()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many steps fit; -1 where there is no bound."""
        return -1 if self.max_length is None else self.max_length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.seen is None:
            return
        self.seen = self.seen[indices.to(self.seen.device)]
        self.snapshots = []
        if self.again is not None:
            self.again = self.again[indices.to(self.again.device)]
        for state in self.states:
            for name in ROWS & state.keys():
                rows = state[name].index_select(0, indices.to(state[name].device))
                set_state(state, name, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.seen is not None:
            rows = torch.arange(len(self.seen), device=self.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def activate_past_recording(self, steps: int = RECORDED_STEPS) -> None:
        """From here on `crop` can take back the last `steps` steps, and as many again once these
        are fed anew.

        The blocks' states are kept up to four times. Recorded rows take no padding.
        """
        self.recorded_steps = max(self.recorded_steps, steps)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes steps back."""
        return self.recorded_steps > 0

    def record(self, steps: Tensor) -> None:
        """Notes what is remembered before a piece of embeddings [batch, length, D]."""
        steps = steps.detach()
        last = self.snapshots[-1].steps if self.snapshots else None
        if last is not None and last.shape[1] + steps.shape[1] <= self.recorded_steps // 2:
            # Feeding a few steps again costs less than another copy.
            joined = torch.cat([last, steps], dim=1)
            self.snapshots[-1] = self.snapshots[-1]._replace(steps=joined)
        else:
            states: list[dict] = [
                {}
                if layer in self.attention
                else {name: state[name].clone() for name in ROWS & state.keys()}
                for layer, state in enumerate(self.states)
            ]
            self.snapshots.append(Snapshot(states, self.seen.clone(), self.room, steps))
        while sum(each.steps.shape[1] for each in self.snapshots[1:]) >= self.recorded_steps:
            del self.snapshots[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove steps back; of a positive number, all but so many.

        Raises:
            ValueError: the cache has not recorded as many.
        """
        count = -tokens_to_remove
        if tokens_to_remove > 0:
            count = max(0, self.get_seq_length() - tokens_to_remove)
        held = sum(each.steps.shape[1] for each in self.snapshots)
        held += 0 if self.again is None else self.again.shape[1]
        if count > held:
            raise ValueError(
                f"{count} steps are to be taken back, of which the cache has recorded {held}; call "
                f"activate_past_recording({count}) before they are fed."
            )
        if count:
            self.columns.sub_(count)
        while count:
            if self.again is None:
                self.again = self._return_to(self.snapshots.pop())
            taken = min(count, self.again.shape[1])
            self.again = self.again[:, : self.again.shape[1] - taken]
            if not self.again.shape[1]:
                self.again = None
            count -= taken

    def _return_to(self, snapshot: Snapshot) -> Tensor:
        """Remembers what it did then; returns the steps since."""
        for state, before in zip(self.states, snapshot.states, strict=True):
            for name, value in before.items():
                set_state(state, name, value)
        self.seen, self.room = snapshot.seen.clone(), snapshot.room
        return snapshot.steps


# What a cache's state has for every row.
ROWS = {"mean", "var", "cema", "keys", "values"}


def set_state(state: dict, name: str, value: Tensor) -> None:
    """Puts a tensor in a state, in its place unless gradients go through either."""
    if state[name].shape == value.shape and in_place(state[name]):
        state[name].copy_(value)
    else:
        state[name] = value.to(state[name].dtype)


def set_rows(state: dict, name: str, rows: Tensor, value: Tensor) -> None:
    """Puts rows in a tensor of a state."""
    set_state(state, name, state[name].index_copy(0, rows, value.to(state[name].dtype)))


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
    """One block, its FFN made of experts or not; see the top of this file."""

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


class MegalodonPlainLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), f attention over the document (`*`), an MLP (`-`) or experts (`E`)."""

    def __init__(self, config: MegalodonConfig, symbol: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config)
        self.attention = DocumentAttention(config) if symbol == "*" else None
        sizes = (config.hidden_size, config.intermediate_size, config.linear_bias)
        self.ffn = GatedMLP(*sizes) if symbol == "-" else None
        self.experts, self.shared_expert = experts_of(config) if symbol == "E" else (None, None)

    def forward(self, x: Tensor, span: Span, state: dict | None = None) -> Tensor:
        """[batch, length, D] to the same; updates the state."""
        u = self.norm(x)
        if self.attention is not None:
            update = self.attention(u, span.place, state)
        else:
            update = mixture(self, u) if self.ffn is None else self.ffn(u)
        return x + F.dropout(update, self.dropout, self.training)


def experts_of(config: MegalodonConfig) -> tuple[Experts, SharedExpert | None]:
    """A layer's experts, and the one for every token where there is one."""
    shared = config.shared_expert_intermediate_size
    return Experts(config), SharedExpert(config) if shared else None


def mixture(layer: MegalodonDecoderLayer | MegalodonPlainLayer, u: Tensor) -> Tensor:
    """A layer's experts of [batch, length, D], shared or not."""
    output = layer.experts(u)
    return output if layer.shared_expert is None else output + layer.shared_expert(u)


def layer_of(config: MegalodonConfig, index: int) -> MegalodonDecoderLayer | MegalodonPlainLayer:
    """A model's layer, by its symbol."""
    symbol = config.symbols[index]
    if symbol in "MX":
        return MegalodonDecoderLayer(config, index, symbol == "X")
    return MegalodonPlainLayer(config, symbol)


class MegalodonPreTrainedModel(PreTrainedModel):
    config_class = MegalodonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegalodonDecoderLayer", "MegalodonPlainLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["cema", "norm", "query_key", "rescale", "router_bias"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The released initializers."""
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            std = 1 / math.sqrt(self.config.hidden_size)
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, nn.Linear | Experts):
            for weight, *fans in projections(module):
                self._init_projection(weight, *fans)
            bias = module.router_bias if isinstance(module, Experts) else module.bias
            if bias is not None:
                init.zeros_(bias)
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

    def _init_projection(self, weight: Tensor, fan_in: int, fan_out: int) -> None:
        mode = self.config.megalodon_init_mode
        if mode == "xavier":
            bound = math.sqrt(6 / (fan_in + fan_out))
            init.uniform_(weight, a=-bound, b=bound)
        elif mode == "gaussian":
            init.trunc_normal_(weight, std=1.0, a=-3.0, b=3.0)
        else:
            init.normal_(weight, std=0.02 if mode == "bert" else 1 / math.sqrt(3 * fan_in))


class MegalodonModel(MegalodonPreTrainedModel):
    """Embedding, layers and final TimestepNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            layer_of(config, index) for index in range(config.num_hidden_layers)
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
            position_ids: follow from the rest; where they start again at 0 in a row, so does a
                sample, which gets what it would get alone. Packed rows take no padding and no
                cache.
            **others: cu_seq_lens_q or seq_idx, which say the same; the rest is ignored.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        batch, length = inputs.shape[:2]
        if length == 0:
            raise ValueError("input_ids is empty; give at least one token.")
        given_use_cache = use_cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = MegalodonCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._check_cache(cache, batch)
        decoding = cache is not None and length == 1
        real = self._real_steps(attention_mask, batch, length, decoding)
        samples = None if decoding else packed_samples(position_ids, real, inputs, others)
        if samples is not None:
            if past_key_values is not None or given_use_cache:
                raise ValueError(
                    "samples are packed into a row, which no cache can go on with; leave out "
                    "use_cache and past_key_values."
                )
            cache = None
        behind = 0
        if cache is not None and cache.recorded_steps:
            inputs, behind = self._after_what_is_fed_again(inputs, real, cache)
            length, decoding, real = inputs.shape[1], inputs.shape[1] == 1, None

        # Real steps go to the front of their rows; `step` says where each column's went.
        compiling = torch.compiler.is_compiling()
        lengths, longest = None, length
        step = torch.arange(length, device=inputs.device).expand(batch, -1)
        if real is not None:
            lengths = real.sum(1)
            step = torch.where(real, real.cumsum(1) - 1, -1)
        if real is not None and not decoding:
            order = real.long().argsort(dim=1, descending=True, stable=True)
            inputs = inputs[torch.arange(batch, device=inputs.device)[:, None], order]
            longest = length if compiling else max(1, int(lengths.max()))

        # Where the rows are; nothing asks while decoding.
        starts, anchor = [0] * batch, 0
        if cache is not None and cache.states:
            starts = None if decoding or compiling else cache.seen.tolist()
            anchor = starts[0] if starts else 0
        bounds = [0, longest]
        cuts = cache is not None and not torch.is_grad_enabled() and not output_hidden_states
        if cuts and not compiling:
            piece = self.config.piece_length
            bounds = [0, *range(piece - anchor % piece, longest, piece), longest]
            recorded = cache.recorded_steps
            if 0 < recorded < longest:
                bounds = sorted({*bounds, longest - recorded})
        columns: slice | Tensor = slice(behind, None)
        if isinstance(positions_to_keep, Tensor):
            columns = positions_to_keep + behind
        elif positions_to_keep:
            columns = slice(-positions_to_keep, None)
        kept_step, output = step[:, columns], None
        hidden_states = [] if output_hidden_states else None
        for first, stop in pairwise(bounds):
            own = None if lengths is None else (lengths - first).clamp(0, stop - first)
            if cache is not None and cache.recorded_steps:
                cache.record(inputs[:, first:stop])
            x = self._run(inputs[:, first:stop], own, cache, starts, samples, hidden_states)
            if starts is not None:
                steps = [stop - first] * batch if own is None else own.tolist()
                starts = [start + more for start, more in zip(starts, steps, strict=True)]
            if real is None and len(bounds) == 2:
                output = x[:, columns]
            else:
                output = put_back(x, kept_step - first, output)
        if output_hidden_states:
            hidden_states = tuple(put_back(x, step[:, behind:]) for x in hidden_states)
        if cache is not None:
            cache.columns.add_(length - behind)
        return BaseModelOutputWithPast(
            last_hidden_state=output, past_key_values=cache, hidden_states=hidden_states
        )

    def _after_what_is_fed_again(
        self, inputs: Tensor, real: Tensor | None, cache: MegalodonCache
    ) -> tuple[Tensor, int]:
        """A piece's embeddings behind those that the cache has to be fed again; how many these are.

        Raises:
            ValueError: the piece has padding.
        """
        if real is not None and not real.all():
            raise ValueError(
                "attention_mask has zeros, but the cache records steps so that they can be taken "
                "back; give rows without padding, or a cache that records none."
            )
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if not cache.states:
            cache.allocate(self, x)
        again, cache.again = cache.again, None
        if again is None:
            return x, 0
        return torch.cat([again.to(x), x], dim=1), again.shape[1]

    def _run(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        cache: MegalodonCache | None,
        starts: list[int] | None,
        samples: list[list[int]] | None,
        hidden_states: list[Tensor] | None,
    ) -> Tensor:
        """One piece, real steps first; updates the cache and appends to hidden_states.

        Of lengths, those of the rows, there are none where nothing is padded; starts are how many
        steps came before, where that is known; samples is what packed_samples returns.
        """
        if samples is not None and kernels is None:
            return self._run_apart(inputs, samples, hidden_states)
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            x = x.masked_fill(padding[..., None], 0)
        x = F.dropout(x, self.config.dropout, self.training)

        if cache is not None and not cache.states:
            cache.allocate(self, x)
        seen = x.new_zeros(len(x), dtype=torch.int64) if cache is None else cache.seen
        span = make_span(self.config, seen, lengths, x, cache is not None, starts, samples)
        if "*" in self.config.symbols:
            room = None
            if cache is not None:
                cache.make_room(x.shape[1])
                room = cache.room
            place = make_place(self.config, seen, x, room, starts, samples)
            span = span._replace(place=place)
        states = [None] * (len(self.layers) + 1) if cache is None else cache.states
        for layer, state in zip((*self.layers, self.norm), states, strict=True):
            if hidden_states is not None and layer is not self.norm:
                hidden_states.append(x)
            x = layer(x, span, state)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            # What gradients saved of it is not written over.
            grows = cache.seen.add if torch.is_grad_enabled() else cache.seen.add_
            cache.seen = grows(span.lengths)
        return x

    def _run_apart(
        self, inputs: Tensor, samples: list[list[int]], hidden_states: list[Tensor] | None
    ) -> Tensor:
        """Packed samples one after another."""
        rows, parts = [], []
        for row, bounds in enumerate(samples):
            outputs = []
            for start, stop in pairwise(bounds):
                part = None if hidden_states is None else []
                sample = inputs[row : row + 1, start:stop]
                outputs.append(self._run(sample, None, None, [0], None, part))
                parts.append(part)
            rows.append(torch.cat(outputs, dim=1))
        if hidden_states is not None:
            for pieces in zip(*parts, strict=True):
                joined = torch.cat(pieces, dim=1)
                hidden_states.append(joined.unflatten(1, inputs.shape[:2]).squeeze(0))
        return torch.cat(rows)

    def _check_cache(self, cache: MegalodonCache | None, batch: int) -> None:
        if cache is None:
            return
        if not isinstance(cache, MegalodonCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; Megalodon takes the MegalodonCache "
                "that a call with use_cache=True returns."
            )
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs blocks twice, which a cache does not take; leave out "
                "use_cache and past_key_values."
            )
        if cache.seen is not None and len(cache.seen) != batch:
            raise ValueError(
                f"The input has {batch} rows and past_key_values {len(cache.seen)}; give as "
                "many rows as the cache holds."
            )

    def _real_steps(
        self, attention_mask: Tensor | None, batch: int, length: int, decoding: bool
    ) -> Tensor | None:
        """Marks what is no padding, bool [batch, length]; None if all is (where one may ask)."""
        if attention_mask is None:
            return None
        shape = attention_mask.shape
        if len(shape) != 2 or shape[0] != batch or shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it takes zeros and ones "
                f"{[batch, length]}, or more columns for what the cache has seen."
            )
        mask = attention_mask[:, -length:]
        real = mask.bool()
        if decoding:
            return real
        require(
            (mask == real).all(),
            "attention_mask has numbers other than 0 and 1; it takes ones for a row's one sample "
            "and zeros for padding.",
        )
        return None if not torch.compiler.is_compiling() and real.all() else real


def packed_samples(
    position_ids: Tensor | None, real: Tensor | None, inputs: Tensor, others: dict
) -> list[list[int]] | None:
    """Where samples start in each row, and its length; None where a row is one sample.

    Raises:
        ValueError: what says so contradicts itself, or samples are packed beside padding.
    """
    batch, length = inputs.shape[:2]
    if position_ids is not None and (
        tuple(position_ids.shape) not in ((batch, length), (1, length))
        or position_ids.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {list(position_ids.shape)}; it takes "
            f"integers {[batch, length]}."
        )
    starts = [
        sample_starts(name, others[name], batch, length)
        for name in PACKING
        if others.get(name) is not None
    ]
    if position_ids is not None and not counts_a_row(position_ids, real, inputs):
        rises = position_ids.diff(dim=1) == 1
        first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
        fresh = torch.cat([first, ~rises], dim=1)
        require(
            (position_ids[:, 1:][~rises] == 0).all(),
            "position_ids jump in a row, but not to 0, where a packed sample would start.",
        )
        starts.append(fresh.expand(batch, -1).cpu())
    if not starts:
        return None
    if any(not torch.equal(other, starts[0]) for other in starts):
        raise ValueError(
            f"position_ids, {', '.join(PACKING)}: two of them disagree on where samples start."
        )
    if int(starts[0].sum()) == batch:
        return None
    if real is not None:
        raise ValueError(
            "attention_mask has zeros and the rows hold packed samples; leave padding out of them, "
            "or give every sample a row of its own."
        )
    return [[*row.nonzero()[:, 0].tolist(), length] for row in starts[0]]


def sample_starts(name: str, value: Tensor, batch: int, length: int) -> Tensor:
    """The first columns of samples, bool [batch, length], by one of PACKING.

    Raises:
        ValueError: it does not fit.
    """
    starts = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
    if name == "seq_idx":
        if tuple(value.shape) != (batch, length):
            raise ValueError(
                f"seq_idx has shape {list(value.shape)}; it takes the number of each token's "
                f"sample, {[batch, length]}."
            )
        starts[:, 0] = True
        starts[:, 1:] = (value.diff(dim=1) != 0).cpu()
        return starts
    bounds = value.flatten().tolist()
    if batch != 1 or bounds[:1] != [0] or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(
            f"{name} is {bounds} for input of shape {[batch, length]}; it takes the cumulative "
            f"lengths of one row's samples, from 0 to {length}."
        )
    starts[0, sorted(set(bounds[:-1]) - {length})] = True
    return starts


def counts_a_row(position_ids: Tensor, real: Tensor | None, inputs: Tensor) -> bool:
    """Whether positions count a row's real steps or its columns, from any number on."""
    batch, length = inputs.shape[:2]
    column = torch.arange(length, device=inputs.device).expand(batch, -1)
    real = torch.ones_like(column, dtype=torch.bool) if real is None else real
    constant = torch.zeros((batch,), dtype=torch.bool, device=inputs.device)
    for count in (real.cumsum(1), column):
        offset = position_ids - count
        least = offset.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1)
        most = offset.masked_fill(~real, torch.iinfo(torch.int64).min).amax(1)
        constant = constant | (least >= most)
    if torch.compiler.is_compiling():
        require(constant.all(), "position_ids restart or jump in a row, but the model is compiled.")
        return True
    return bool(constant.all())


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
        marks = {name: loss_arguments.pop(name) for name in PACKING if name in loss_arguments}
        if labels is not None and (marks or position_ids is not None):
            labels = self._without_first_of_samples(labels, attention_mask, position_ids, marks)
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
            **marks,
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

    def _without_first_of_samples(
        self,
        labels: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        marks: dict,
    ) -> Tensor:
        """Labels with -100 for samples' first tokens, which nothing before them predicts."""
        real = self.model._real_steps(attention_mask, *labels.shape, False)
        samples = packed_samples(position_ids, real, labels, marks)
        if samples is None:
            return labels
        labels = labels.clone()
        for row, bounds in enumerate(samples):
            labels[row, bounds[:-1]] = -100
        return labels

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: object = None,
        batch_size: int | None = None,
        max_cache_length: int | None = None,
    ) -> None:
        """Makes the cache for `generate`, which calls this: Megalodon has one kind."""
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; Megalodon's "
                "cache is of constant size, and 'static' lets transformers compile a step."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            static = generation_config.cache_implementation == "static"
            length = max_cache_length if static else None
            cache = MegalodonCache(self.config, static, length)
            model_kwargs["past_key_values"] = cache
            assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
            if assisted or generation_config.is_assistant:
                cache.activate_past_recording()

    def prepare_inputs_for_generation(
        self, *args: object, inputs_embeds: Tensor | None = None, **kwargs: object
    ) -> dict:
        """Of the mask, which grows with the sequence, only what goes with the new tokens."""
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = inputs["attention_mask"][:, -given.shape[1] :].contiguous()
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: MegalodonConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **_: object
    ) -> Tensor | None:
        """Makes no mask of queries and keys; `generate` asks for it where the cache is static."""
        return attention_mask

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
