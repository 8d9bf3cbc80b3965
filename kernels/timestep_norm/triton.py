"""TimestepNorm in Triton: one program walks a stretch of time for a few groups.

A tile is T steps of GB groups, [T, GB, SP] in registers, with the D/G channels of a group padded
to SP. Each step's mean and variance are taken in float32; everything D/G times smaller is
float64: prefix sums over the tile's steps about the tile's mean, merged with the statistics of
all earlier tiles (count, mean, M2) as Chan et al. merge variances. So neither the length nor a
large mean costs digits. The statistics before every tile are kept for backward (24 bytes a tile and
group), which recomputes the rest from x and walks time in reverse.

Where batch and groups alone fill the card a program walks the whole sequence, and everything is
read once. Otherwise time is cut into segments, whose totals a first kernel takes: x is read twice
forward, x and the gradient twice backward. Sums are taken in a fixed order, without atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side
from .state import TimestepNormState

# Scalars in a tile: enough bytes in flight, few enough to stay in registers.
TILE = 2048
# Bytes side by side that a tile's rows take where groups are smaller: a cache line.
LINE = 128
# Tiles on their way from memory while one is worked on.
STAGES = 3
# Programs that keep a card busy; with less than half as many, time is cut into segments. A tile is
# a chain of some 700 instructions a warp forward, so that instructions bind before bytes do: one
# walk by 64 programs (7b, a single sequence) would leave half an H100 idle and the rest waiting,
# which costs more than reading x twice. Counted in the machine code, unmeasured on a GPU.
PROGRAMS = 512


def timestep_norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, TimestepNormState | None]:
    """Same arguments and results as `timestep_norm`, length at least 1; nothing is checked."""
    batch, length, _ = x.shape
    if state is None:
        count = torch.zeros(batch, dtype=torch.int64, device=x.device)
        mean = var = torch.zeros(batch, num_groups, device=x.device)
    else:
        count, mean, var = state.count, state.mean.float(), state.var.float()
    y, mean, var = _TimestepNorm.apply(x, weight, bias, mean, var, count, eps)
    if not return_state:
        return y, None
    return y, TimestepNormState(count + length, mean, var)


def timestep_statistics_triton(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Same argument and results as `timestep_statistics`; nothing is checked here."""
    return _TimestepStatistics.apply(x, num_groups)


class Tiling(NamedTuple):
    """How [batch, length, groups * size] is cut; see the module's first lines."""

    size: int
    padded: int
    group_block: int
    steps: int
    group_blocks: int
    chunks: int
    segment: int
    segments: int
    warps: int

    @classmethod
    def of(cls, x: Tensor, groups: int, fewest: int = 1) -> "Tiling":
        """Cut for x; `fewest` segments are asked for even where one would do."""
        batch, length, channels = x.shape
        size = channels // groups
        padded = triton.next_power_of_2(size)
        group_block = max(
            1, min(LINE // x.element_size() // padded, triton.next_power_of_2(groups))
        )
        width = padded * group_block
        steps = max(1, min(TILE // width, 64, triton.next_power_of_2(length)))
        group_blocks = triton.cdiv(groups, group_block)
        chunks = triton.cdiv(length, steps)
        programs = max(1, batch * group_blocks)
        wanted = 1 if 2 * programs >= PROGRAMS else triton.cdiv(PROGRAMS, programs)
        segment = triton.cdiv(chunks, min(chunks, max(wanted, fewest)))
        segments = triton.cdiv(chunks, segment)
        warps = min(16, max(1, steps * width // 512))
        return cls(
            *(size, padded, group_block, steps, group_blocks, chunks, segment, segments, warps)
        )

    def grid(self, rows: int, segments: int) -> tuple[int, int]:
        return rows * self.group_blocks, segments

    def constants(self, groups: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "G": groups,
            "S": self.size,
            "GB": self.group_block,
            "SP": self.padded,
            "T": self.steps,
            "STAGES": STAGES,
            "num_warps": self.warps,
        }


class _TimestepNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_in: Tensor,
        var_in: Tensor,
        count_in: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, mean_in, var_in = side_by_side(x), mean_in.contiguous(), var_in.contiguous()
        weight, bias, count_in = weight.contiguous(), bias.contiguous(), count_in.contiguous()
        batch, length, channels = x.shape
        groups = mean_in.shape[1]
        tiling = Tiling.of(x, groups)
        constants = tiling.constants(groups)
        y = torch.empty_like(x)
        mean, var = torch.empty_like(mean_in), torch.empty_like(var_in)
        with on_device_of(x):
            totals = _totals(x, length, tiling, constants, tiling.segments - 1)
            before = _doubles(x, batch, tiling.chunks, 3, groups)
            forward_kernel[tiling.grid(batch, tiling.segments)](
                *(x, y, weight, bias, count_in, mean_in, var_in, totals, before, mean, var),
                *(length, tiling.segment, eps),
                *(*x.stride()[:2], *y.stride()[:2]),
                **constants,
            )
        ctx.save_for_backward(x, weight, mean_in, count_in, before)
        ctx.eps, ctx.tiling = eps, tiling
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean_in, count_in, before = ctx.saved_tensors
        tiling = ctx.tiling
        batch, length, channels = x.shape
        groups = mean_in.shape[1]
        constants = tiling.constants(groups)
        grad_y = side_by_side(grad_y)
        grad_mean, grad_var = grad_mean.contiguous(), grad_var.contiguous()
        grad_x = torch.empty_like(x)
        grad_mean_in, grad_var_in = torch.empty_like(mean_in), torch.empty_like(mean_in)
        strides = (*x.stride()[:2], *grad_y.stride()[:2])
        inputs = (x, grad_y, weight, before, grad_mean, grad_var)
        sizes = (length, tiling.segment, ctx.eps)
        with on_device_of(x):
            totals = _doubles(x, batch, tiling.segments, 2, groups)
            if tiling.segments > 1:
                # Only the later segments' totals are needed: the first one's place stays unset.
                backward_totals_kernel[tiling.grid(batch, tiling.segments - 1)](
                    *(*inputs, totals, *sizes, *strides), **constants
                )
            partial = _doubles(x, batch, tiling.segments, 2, channels)
            backward_kernel[tiling.grid(batch, tiling.segments)](
                *inputs,
                *(totals, count_in, mean_in, grad_x, partial, grad_mean_in, grad_var_in),
                *(*sizes, *strides, *grad_x.stride()[:2]),
                **constants,
            )
            grad_weight, grad_bias = partial.sum((0, 1)).to(weight.dtype).unbind(0)
        return grad_x, grad_weight, grad_bias, grad_mean_in, grad_var_in, None, None


class _TimestepStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        x = side_by_side(x)
        batch, length, _ = x.shape
        tiling = Tiling.of(x, groups, fewest=PROGRAMS // batch)
        constants = tiling.constants(groups)
        with on_device_of(x):
            totals = _totals(x, length, tiling, constants, tiling.segments)
        count, means, m2 = totals.unbind(2)
        mean = (count * means).sum(1) / length
        var = (m2 + count * (means - mean[:, None]).square()).sum(1) / length
        ctx.save_for_backward(x, mean)
        ctx.tiling = tiling
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_mean: Tensor,
        grad_var: Tensor,
    ) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        tiling, (batch, length, _), groups = ctx.tiling, x.shape, mean.shape[1]
        scalars = length * tiling.size
        # slope (x - mean) + grad_mean / scalars, about the rounded mean.
        rounded = mean.float()
        slope = grad_var * (2 / scalars)
        constant = (grad_mean / scalars - slope * (mean - rounded)).float()
        grad_x = torch.empty_like(x)
        with on_device_of(x):
            statistics_backward_kernel[tiling.grid(batch * tiling.chunks, 1)](
                *(x, grad_x, rounded, slope.float().contiguous(), constant, length),
                *(*x.stride()[:2], *grad_x.stride()[:2]),
                **tiling.constants(groups),
            )
        return grad_x, None


def _doubles(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def _totals(
    x: Tensor, length: int, tiling: Tiling, constants: dict[str, Any], segments: int
) -> Tensor:
    """(count, mean, M2) of the first segments, float64 [batch, segments, 3, groups]."""
    batch = x.shape[0]
    totals = _doubles(x, batch, tiling.segments, 3, constants["G"])
    if segments:
        totals_kernel[tiling.grid(batch, segments)](
            *(x, totals, length, tiling.segment, tiling.segments, *x.stride()[:2]),
            **constants,
        )
    return totals


@triton.jit
def _rows_and_groups(G: tl.constexpr, GB: tl.constexpr):
    """A program's batch row and its groups [GB]."""
    BLOCKS: tl.constexpr = (G + GB - 1) // GB
    program = tl.program_id(0)
    return (program // BLOCKS).to(tl.int64), program % BLOCKS * GB + tl.arange(0, GB)


@triton.jit
def _steps_so_far(first, length, T: tl.constexpr):
    """Of a tile that begins at `first`: how many steps it has, and up to each [T]; float64."""
    steps = tl.minimum(length - first, T).to(tl.float64)
    return steps, tl.minimum(tl.arange(0, T) + 1, length - first).to(tl.float64)


@triton.jit
def _deviations(x, real, steps, inside, S: tl.constexpr):
    """A tile's rough mean [GB], each step's mean about it and its variance [T, GB]; float64.

    x is 0 where there is nothing, `steps` how many of its steps are real. A step's mean is taken
    twice, so that its error is small beside the step's own spread.
    """
    PADDED: tl.constexpr = S < x.shape[2]
    rough = tl.sum(x, 2) / S
    centred = x - rough[:, :, None]
    if PADDED:
        centred = tl.where(inside[None], centred, 0.0)
    rest = tl.sum(centred, 2) / S
    centred -= rest[:, :, None]
    if PADDED:
        centred = tl.where(inside[None], centred, 0.0)
    var = tl.sum(centred * centred, 2) / S
    shift = tl.sum(rough, 0).to(tl.float64) / tl.maximum(steps, 1.0)
    mean = rough.to(tl.float64) - shift[None] + rest.to(tl.float64)
    return shift, tl.where(real[:, None], mean, 0.0), var.to(tl.float64)


@triton.jit
def _merge(n, mean, m2, more, more_mean, more_m2):
    """Statistics of two sets together, one of n steps and one of `more` (Chan et al.)."""
    both = n + more
    share = more / tl.maximum(both, 1.0)
    delta = more_mean - mean
    return both, mean + delta * share, m2 + more_m2 + delta * delta * (n * share)


@triton.jit
def _running(x, real, steps, so_far, inside, n, mean, m2, S: tl.constexpr):
    """Count [T, 1], mean and M2 [T, GB] at every step, float64, after (n, mean, m2) [GB]."""
    shift, step_mean, step_var = _deviations(x, real, steps, inside, S)
    steps = so_far[:, None]
    s1 = tl.cumsum(step_mean, 0)
    s2 = tl.cumsum(step_var + step_mean * step_mean, 0)
    offset = s1 / tl.maximum(steps, 1.0)
    spread = tl.maximum(s2 - s1 * offset, 0.0)
    here = shift[None] + offset
    return _merge(n[None], mean[None], m2[None], steps, here, spread)


@triton.jit
def _row(z, which: tl.constexpr, T: tl.constexpr):
    """Row `which` of z [T, GB]."""
    return tl.sum(tl.where((tl.arange(0, T) == which)[:, None], z, 0.0), 0)


@triton.jit
def _load_three(pointer, g, groups, there):
    """(count, mean, M2) of groups g from [3, groups]."""
    n = tl.load(pointer + g, mask=there, other=0.0)
    mean = tl.load(pointer + groups + g, mask=there, other=0.0)
    return n, mean, tl.load(pointer + 2 * groups + g, mask=there, other=0.0)


@triton.jit
def _store_three(pointer, g, groups, there, n, mean, m2):
    tl.store(pointer + g, n, mask=there)
    tl.store(pointer + groups + g, mean, mask=there)
    tl.store(pointer + 2 * groups + g, m2, mask=there)


@kernel
def totals_kernel(
    x_ptr,
    totals,
    length,
    segment,
    segments,
    x_batch,
    x_step,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """totals[b, segment] = (count, mean, M2) of this segment alone."""
    row, g = _rows_and_groups(G, GB)
    part = tl.program_id(1)
    s = tl.arange(0, SP)
    channel = g[:, None] * S + s[None]
    inside = (g < G)[:, None] & (s < S)[None]
    n = tl.zeros([GB], tl.float64)
    mean = tl.zeros([GB], tl.float64)
    m2 = tl.zeros([GB], tl.float64)
    last = tl.minimum((part + 1) * segment, tl.cdiv(length, T))
    for chunk in tl.range(part * segment, last, num_stages=STAGES):
        t = chunk * T + tl.arange(0, T)
        real = t < length
        there = real[:, None, None] & inside[None]
        at = row * x_batch + t.to(tl.int64)[:, None, None] * x_step + channel[None]
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        steps, _so_far = _steps_so_far(chunk * T, length, T)
        shift, step_mean, step_var = _deviations(x, real, steps, inside, S)
        s1 = tl.sum(step_mean, 0)
        s2 = tl.sum(step_var + step_mean * step_mean, 0)
        offset = s1 / tl.maximum(steps, 1.0)
        spread = tl.maximum(s2 - s1 * offset, 0.0)
        n, mean, m2 = _merge(n, mean, m2, steps, shift + offset, spread)
    to = totals + (row * segments + part) * 3 * G
    _store_three(to, g, G, g < G, n, mean, m2)


@kernel
def forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    count_in,
    mean_in,
    var_in,
    totals,
    before,
    mean_out,
    var_out,
    length,
    segment,
    eps,
    x_batch,
    x_step,
    y_batch,
    y_step,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """y of one segment, and (count, mean, M2) before each of its tiles into `before`."""
    row, g = _rows_and_groups(G, GB)
    part = tl.program_id(1)
    s = tl.arange(0, SP)
    channel = g[:, None] * S + s[None]
    inside = (g < G)[:, None] & (s < S)[None]
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    n = tl.load(count_in + row).to(tl.float64) + tl.zeros([GB], tl.float64)
    mean = tl.load(mean_in + row * G + g, mask=g < G, other=0.0).to(tl.float64)
    var = tl.load(var_in + row * G + g, mask=g < G, other=0.0).to(tl.float64)
    mean = tl.where(n > 0, mean, 0.0)
    m2 = tl.where(n > 0, n * var, 0.0)
    for earlier in range(0, part):
        entry = totals + (row * tl.num_programs(1) + earlier) * 3 * G
        more, more_mean, more_m2 = _load_three(entry, g, G, g < G)
        n, mean, m2 = _merge(n, mean, m2, more, more_mean, more_m2)

    chunks = tl.cdiv(length, T)
    last = tl.minimum((part + 1) * segment, chunks)
    for chunk in tl.range(part * segment, last, num_stages=STAGES):
        _store_three(before + (row * chunks + chunk) * 3 * G, g, G, g < G, n, mean, m2)
        t = chunk * T + tl.arange(0, T)
        real = t < length
        there = real[:, None, None] & inside[None]
        wide = t.to(tl.int64)[:, None, None]
        x = tl.load(
            x_ptr + row * x_batch + wide * x_step + channel[None], mask=there, other=0.0
        ).to(tl.float32)
        steps, so_far = _steps_so_far(chunk * T, length, T)
        counts, means, m2s = _running(x, real, steps, so_far, inside, n, mean, m2, S)
        var_t = (m2s / tl.maximum(counts, 1.0) + eps).to(tl.float32)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(var_t))
        high = means.to(tl.float32)
        low = (means - high).to(tl.float32) * rstd
        normed = (x - high[:, :, None]) * rstd[:, :, None] - low[:, :, None]
        y = normed * gain[None] + bias[None]
        tl.store(
            y_ptr + row * y_batch + wide * y_step + channel[None],
            y.to(y_ptr.dtype.element_ty),
            mask=there,
        )
        n += steps
        mean = _row(means, T - 1, T)
        m2 = _row(m2s, T - 1, T)
    if last == chunks:
        tl.store(mean_out + row * G + g, mean.to(tl.float32), mask=g < G)
        var = m2 / tl.maximum(n, 1.0)
        tl.store(var_out + row * G + g, var.to(tl.float32), mask=g < G)


@triton.jit
def _tile_backward(
    x,
    grad,
    gain,
    real,
    steps,
    so_far,
    inside,
    at_end,
    grad_mean,
    grad_var,
    n,
    mean,
    m2,
    eps,
    S: tl.constexpr,
):
    """The gradient that a tile's steps send back through the running statistics, and its parts.

    With A, V the running mean and variance of count n: a = dL/dA / n - 2 A v, v = dL/dV / n. A
    scalar x at step t then gets (sum_{t..} a + 2 x sum_{t..} v) / S from this and later steps.
    """
    counts, means, m2s = _running(x, real, steps, so_far, inside, n, mean, m2, S)
    counts = tl.maximum(counts, 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn((m2s / counts + eps).to(tl.float32)))
    high = means.to(tl.float32)
    low = (means - high).to(tl.float32)
    # Where there is nothing it is no zero, but meets a gradient of zero.
    centred = x - high[:, :, None]
    normed = centred * rstd[:, :, None] - (low * rstd)[:, :, None]
    gained = grad * gain[None]
    to_mean = -tl.sum(gained, 2) * rstd
    to_var = -0.5 * tl.sum(gained * normed, 2) * rstd * rstd
    to_mean = to_mean.to(tl.float64) + tl.where(at_end[:, None], grad_mean[None], 0.0)
    to_var = to_var.to(tl.float64) + tl.where(at_end[:, None], grad_var[None], 0.0)
    v = to_var / counts
    a = to_mean / counts - 2.0 * means * v
    return a, v, means, low, rstd, centred, normed, gained


@kernel
def backward_totals_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    before,
    grad_mean_ptr,
    grad_var_ptr,
    totals,
    length,
    segment,
    eps,
    x_batch,
    x_step,
    grad_batch,
    grad_step,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """totals[b, segment] = sums of `_tile_backward`'s a and v, for all segments but the first."""
    row, g = _rows_and_groups(G, GB)
    part = tl.program_id(1) + 1
    s = tl.arange(0, SP)
    channel = g[:, None] * S + s[None]
    inside = (g < G)[:, None] & (s < S)[None]
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    grad_mean = tl.load(grad_mean_ptr + row * G + g, mask=g < G, other=0.0).to(tl.float64)
    grad_var = tl.load(grad_var_ptr + row * G + g, mask=g < G, other=0.0).to(tl.float64)
    sum_a = tl.zeros([GB], tl.float64)
    sum_v = tl.zeros([GB], tl.float64)
    chunks = tl.cdiv(length, T)
    last = tl.minimum((part + 1) * segment, chunks)
    for chunk in tl.range(part * segment, last, num_stages=STAGES):
        t = chunk * T + tl.arange(0, T)
        real = t < length
        there = real[:, None, None] & inside[None]
        wide = t.to(tl.int64)[:, None, None]
        x = tl.load(
            x_ptr + row * x_batch + wide * x_step + channel[None], mask=there, other=0.0
        ).to(tl.float32)
        grad = tl.load(
            grad_ptr + row * grad_batch + wide * grad_step + channel[None], mask=there, other=0.0
        ).to(tl.float32)
        entry = before + (row * chunks + chunk) * 3 * G
        n, mean, m2 = _load_three(entry, g, G, g < G)
        steps, so_far = _steps_so_far(chunk * T, length, T)
        a, v, _means, _low, _rstd, _centred, _normed, _gained = _tile_backward(
            *(x, grad, gain, real, steps, so_far, inside, t == length - 1, grad_mean, grad_var),
            *(n, mean, m2, eps, S),
        )
        sum_a += tl.sum(a, 0)
        sum_v += tl.sum(v, 0)
    to = totals + (row * (tl.num_programs(1) + 1) + part) * 2 * G
    tl.store(to + g, sum_a, mask=g < G)
    tl.store(to + G + g, sum_v, mask=g < G)


@kernel
def backward_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    before,
    grad_mean_ptr,
    grad_var_ptr,
    totals,
    count_in,
    mean_in,
    grad_x_ptr,
    partial,
    grad_mean_in,
    grad_var_in,
    length,
    segment,
    eps,
    x_batch,
    x_step,
    grad_batch,
    grad_step,
    grad_x_batch,
    grad_x_step,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of x and of the incoming mean and var, and this segment's of weight and bias."""
    row, g = _rows_and_groups(G, GB)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    s = tl.arange(0, SP)
    channel = g[:, None] * S + s[None]
    inside = (g < G)[:, None] & (s < S)[None]
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    grad_mean = tl.load(grad_mean_ptr + row * G + g, mask=g < G, other=0.0).to(tl.float64)
    grad_var = tl.load(grad_var_ptr + row * G + g, mask=g < G, other=0.0).to(tl.float64)

    sum_a = tl.zeros([GB], tl.float64)
    sum_v = tl.zeros([GB], tl.float64)
    for later in range(part + 1, parts):
        entry = totals + (row * parts + later) * 2 * G
        sum_a += tl.load(entry + g, mask=g < G, other=0.0)
        sum_v += tl.load(entry + G + g, mask=g < G, other=0.0)
    grad_weight = tl.zeros([GB, SP], tl.float64)
    grad_bias = tl.zeros([GB, SP], tl.float64)

    chunks = tl.cdiv(length, T)
    first = part * segment
    last = tl.minimum(first + segment, chunks)
    for back in tl.range(0, last - first, num_stages=STAGES):
        chunk = last - 1 - back
        t = chunk * T + tl.arange(0, T)
        real = t < length
        there = real[:, None, None] & inside[None]
        wide = t.to(tl.int64)[:, None, None]
        x = tl.load(
            x_ptr + row * x_batch + wide * x_step + channel[None], mask=there, other=0.0
        ).to(tl.float32)
        grad = tl.load(
            grad_ptr + row * grad_batch + wide * grad_step + channel[None], mask=there, other=0.0
        ).to(tl.float32)
        entry = before + (row * chunks + chunk) * 3 * G
        n, mean, m2 = _load_three(entry, g, G, g < G)
        steps, so_far = _steps_so_far(chunk * T, length, T)
        a, v, means, low, rstd, centred, normed, gained = _tile_backward(
            *(x, grad, gain, real, steps, so_far, inside, t == length - 1, grad_mean, grad_var),
            *(n, mean, m2, eps, S),
        )
        grad_weight += tl.sum(grad * normed, 0).to(tl.float64)
        grad_bias += tl.sum(grad, 0).to(tl.float64)

        from_here_a = sum_a[None] + tl.cumsum(a, 0, reverse=True)
        from_here_v = sum_v[None] + tl.cumsum(v, 0, reverse=True)
        sum_a = _row(from_here_a, 0, T)
        sum_v = _row(from_here_v, 0, T)
        # (a + 2 x v) / S with x = centred + mean, and centred taken about the rounded mean.
        slope = (from_here_v * (2.0 / S)).to(tl.float32)
        constant = ((from_here_a + 2.0 * means * from_here_v) / S).to(tl.float32) - slope * low
        grad_x = gained * rstd[:, :, None] + centred * slope[:, :, None] + constant[:, :, None]
        tl.store(
            grad_x_ptr + row * grad_x_batch + wide * grad_x_step + channel[None],
            grad_x.to(grad_x_ptr.dtype.element_ty),
            mask=there,
        )

    to = partial + (row * parts + part) * 2 * (G * S)
    tl.store(to + channel, grad_weight, mask=inside)
    tl.store(to + G * S + channel, grad_bias, mask=inside)
    if part == 0:
        seen = tl.load(count_in + row).to(tl.float64)
        mean = tl.load(mean_in + row * G + g, mask=g < G, other=0.0).to(tl.float64)
        to_mean = tl.where(seen > 0, seen * (sum_a + 2.0 * mean * sum_v), 0.0)
        tl.store(grad_mean_in + row * G + g, to_mean.to(tl.float32), mask=g < G)
        tl.store(grad_var_in + row * G + g, (seen * sum_v).to(tl.float32), mask=g < G)


@kernel
def statistics_backward_kernel(
    x_ptr,
    grad_x_ptr,
    mean_ptr,
    slope_ptr,
    constant_ptr,
    length,
    x_batch,
    x_step,
    grad_batch,
    grad_step,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """grad_x = slope (x - mean) + constant, the three of each batch row and group."""
    row, g = _rows_and_groups(G, GB)
    chunks = tl.cdiv(length, T)
    chunk = (row % chunks).to(tl.int32)
    row = row // chunks
    s = tl.arange(0, SP)
    channel = g[:, None] * S + s[None]
    t = chunk * T + tl.arange(0, T)
    there = (t < length)[:, None, None] & ((g < G)[:, None] & (s < S)[None])[None]
    mean = tl.load(mean_ptr + row * G + g, mask=g < G, other=0.0)[None, :, None]
    slope = tl.load(slope_ptr + row * G + g, mask=g < G, other=0.0)[None, :, None]
    constant = tl.load(constant_ptr + row * G + g, mask=g < G, other=0.0)[None, :, None]
    wide = t.to(tl.int64)[:, None, None]
    x = tl.load(x_ptr + row * x_batch + wide * x_step + channel[None], mask=there, other=0.0).to(
        tl.float32
    )
    grad_x = (x - mean) * slope + constant
    tl.store(
        grad_x_ptr + row * grad_batch + wide * grad_step + channel[None],
        grad_x.to(grad_x_ptr.dtype.element_ty),
        mask=there,
    )
