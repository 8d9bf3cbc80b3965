"""TimestepNorm in Triton: moments of each step, sums of those along segments, and what they norm.

Kernels over x know nothing of segments: a tile is T steps of GB groups, [T, GB, SP] in registers,
with the D/G channels of a group padded to SP, and a program takes every so manyth tile. Between
them one program for each segment and group walks through tables D/G times smaller than x, of shape
[batch, G, length], in which a group's steps stand side by side. Its sums are float64 and about a
shift near the segment's data, so that neither the length nor a large mean costs digits; the means
are kept in float64, all else in float32. Sums are taken in a fixed order, without atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import kernel, on_device_of, side_by_side
from ..segments import Segments
from .autograd import Path

# Scalars in a tile: enough bytes in flight, few enough to stay in registers.
TILE = 2048
# Bytes side by side that a tile's rows take where groups are smaller: a cache line.
LINE = 128
# Tiles on their way from memory while one is worked on.
STAGES = 3
# Programs that keep a card busy; where tiles are more, a program takes several.
PROGRAMS = 2048
# Steps of a segment that are summed up at a time; down to an eighth where all segments are short.
SCAN = 1024


class Tiling(NamedTuple):
    """How [length, batch, groups * size] is cut; see the module's first lines."""

    groups: int
    size: int
    padded: int
    group_block: int
    steps: int
    tiles: int
    programs: int

    @classmethod
    def of(cls, x: Tensor, groups: int) -> "Tiling":
        length, batch, channels = x.shape
        size = channels // groups
        padded = triton.next_power_of_2(size)
        side_by_side = LINE // x.element_size() // padded
        group_block = max(1, min(side_by_side, triton.next_power_of_2(groups)))
        steps = max(1, min(TILE // (padded * group_block), 64))
        tiles = batch * triton.cdiv(length, steps)
        programs = min(tiles, triton.cdiv(PROGRAMS, triton.cdiv(groups, group_block)))
        return cls(groups, size, padded, group_block, steps, tiles, programs)

    def launch(self, function: Any, x: Tensor, *arguments: Any, tiles: int | None = None) -> None:
        """Runs a kernel over x's tiles, or over so many of them."""
        width = self.steps * self.padded * self.group_block
        function[self.programs * triton.cdiv(self.groups, self.group_block),](
            x,
            *arguments,
            x.shape[0],
            self.tiles if tiles is None else tiles,
            self.programs,
            G=self.groups,
            S=self.size,
            GB=self.group_block,
            SP=self.padded,
            T=self.steps,
            STAGES=STAGES,
            num_warps=min(16, max(1, width // 512)),
        )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    segments: Segments,
    mean_in: Tensor | None,
    var_in: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, running mean (float64) and var [batch, G, length], and both after each segment."""
    x = side_by_side(x)
    y = torch.empty_like(x)
    tiling = Tiling.of(x, groups)
    after = x.new_empty(2, len(segments), groups, dtype=torch.float32)
    with on_device_of(x):
        mean, var = _moments(x, tiling)
        _scan(
            scan_kernel,
            segments,
            groups,
            mean,
            var,
            _beside(mean_in),
            _beside(var_in),
            *after,
            RUNNING=True,
        )
        tiling.launch(
            apply_kernel,
            *(x, y, weight.contiguous(), bias.contiguous(), mean, var, eps),
            *(*x.stride()[:2], *y.stride()[:2]),
        )
    return y, mean, var, *after


def _backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    mean_in: Tensor | None,
    groups: int,
    eps: float,
    segments: Segments,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of mean and var before each segment."""
    x, grad_y, weight = side_by_side(x), side_by_side(grad_y), weight.contiguous()
    grad_x = torch.empty_like(x)
    tiling = Tiling.of(x, groups)
    parts = x.new_empty(2, tiling.programs, x.shape[2], dtype=torch.float64)
    first, second = torch.empty_like(var), torch.empty_like(var)
    before = x.new_empty(2, len(segments), groups, dtype=torch.float32)
    given, strides = (weight, mean, var), (*x.stride()[:2], *grad_y.stride()[:2])
    with on_device_of(x):
        tiling.launch(terms_kernel, x, grad_y, *given, first, second, *parts, eps, *strides)
        _scan(
            *(scan_back_kernel, segments, groups, mean, first, second, _beside(mean_in)),
            *(grad_mean.contiguous(), grad_var.contiguous(), *before, tiling.size),
        )
        tiling.launch(
            input_gradient_kernel,
            *(x, grad_y, grad_x, *given, first, second, eps, *strides, *grad_x.stride()[:2]),
        )
    grad_weight, grad_bias = parts.sum(1).to(weight.dtype).unbind(0)
    return grad_x, grad_weight, grad_bias, *before


def _statistics(x: Tensor, groups: int, segments: Segments) -> tuple[Tensor, Tensor]:
    x = side_by_side(x)
    tiling = Tiling.of(x, groups)
    found = x.new_empty(2, len(segments), groups, dtype=torch.float64)
    with on_device_of(x):
        mean, var = _moments(x, tiling, _tiles(segments, tiling.steps, x.device))
        _scan(scan_kernel, segments, groups, mean, var, None, None, *found, RUNNING=False)
    return tuple(found)


def _spread(x: Tensor, mean: Tensor, slope: Tensor, constant: Tensor, segments: Segments) -> Tensor:
    x = side_by_side(x)
    grad_x = torch.empty_like(x)
    rounded = mean.float()
    line = torch.stack((rounded, slope, constant - slope * (mean - rounded))).float()
    with on_device_of(x):
        Tiling.of(x, mean.shape[1]).launch(
            spread_kernel,
            *(x, grad_x, _owners(segments, x.device), *line),
            *(*x.stride()[:2], *grad_x.stride()[:2]),
        )
    return grad_x


PATH = Path(_forward, _backward, _statistics, _spread)


def _moments(x: Tensor, tiling: Tiling, tiles: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each step's mean (float64) and population variance, [batch, G, length], of some tiles."""
    length, batch, _ = x.shape
    mean = x.new_empty(batch, tiling.groups, length, dtype=torch.float64)
    var = torch.empty_like(mean, dtype=torch.float32)
    number = None if tiles is None else len(tiles)
    tiling.launch(moments_kernel, x, tiles, mean, var, *x.stride()[:2], tiles=number)
    return mean, var


def _scan(
    function: Any,
    segments: Segments,
    groups: int,
    mean: Tensor,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Runs a kernel along each segment and group of tables [batch, G, length]."""
    longest = segments.kept("longest", lambda: max(segment.length for segment in segments))
    steps = min(SCAN, max(SCAN // 8, triton.next_power_of_2(longest)))
    function[len(segments) * groups,](
        *(segments.table(mean.device), mean, *arguments, mean.shape[2]),
        **constants,
        G=groups,
        BLOCK=steps,
        STAGES=STAGES,
        num_warps=max(1, steps // 128),
    )


def _beside(z: Tensor | None) -> Tensor | None:
    return None if z is None else z.contiguous()


def _owners(segments: Segments, device: torch.device) -> Tensor:
    """Which segment each step belongs to, -1 for none; int32 [batch, length]."""
    return segments.kept(
        ("timestep norm owners", device), lambda: segments.owners(device).mT.int().contiguous()
    )


def _tiles(segments: Segments, steps: int, device: torch.device) -> Tensor | None:
    """The tiles of so many steps that hold steps of segments, int32; None for all tiles."""

    def make() -> Tensor | None:
        chunks = triton.cdiv(segments.length, steps)
        tiles = {
            segment.row * chunks + chunk
            for segment in segments
            for chunk in range(segment.start // steps, (segment.steps.stop - 1) // steps + 1)
        }
        if len(tiles) == segments.batch * chunks:
            return None
        return torch.tensor(sorted(tiles), dtype=torch.int32).to(device)

    return segments.kept(("timestep norm tiles", steps, device), make)


@triton.jit
def _groups_and_part(G: tl.constexpr, S: tl.constexpr, GB: tl.constexpr, SP: tl.constexpr):
    """A program's number among those of the same groups, its groups [GB] and channels [GB, SP]."""
    BLOCKS: tl.constexpr = (G + GB - 1) // GB
    program = tl.program_id(0)
    g = program % BLOCKS * GB + tl.arange(0, GB)
    s = tl.arange(0, SP)
    return program // BLOCKS, g, g[:, None] * S + s[None], (g < G)[:, None] & (s < S)[None]


@triton.jit
def _steps(tile, length, T: tl.constexpr):
    """A tile's row and steps [T], and which of these there are."""
    chunks = tl.cdiv(length, T)
    t = (tile % chunks).to(tl.int64) * T + tl.arange(0, T)
    return (tile // chunks).to(tl.int64), t, t < length


@triton.jit
def _places_of(row, t, g, length, G: tl.constexpr):
    """Where a tile's statistics [T, GB] stand in tables [batch, G, length]."""
    return (row * G + g)[None] * length + t[:, None]


@triton.jit
def _load_tile(ptr, row, t, channel, there, step, row_step):
    """A tile of x or of a gradient, float32 [T, GB, SP]."""
    at = row * row_step + t[:, None, None] * step + channel[None]
    return tl.load(ptr + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, value, row, t, channel, there, step, row_step):
    at = row * row_step + t[:, None, None] * step + channel[None]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def _normed(x, mean_ptr, var_ptr, places, real, eps):
    """x normalized and x less the rounded mean [T, GB, SP], and 1 / deviation [T, GB]."""
    mean = tl.load(mean_ptr + places, mask=real, other=0.0)
    var = tl.load(var_ptr + places, mask=real, other=1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    high = mean.to(tl.float32)
    low = (mean - high).to(tl.float32) * rstd
    centred = x - high[:, :, None]
    return centred * rstd[:, :, None] - low[:, :, None], centred, rstd


@kernel
def moments_kernel(
    x_ptr,
    tiles_ptr,
    mean_ptr,
    var_ptr,
    x_step,
    x_row,
    length,
    tiles,
    programs,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Mean and variance of each step's groups, of all tiles or of those listed.

    The mean is taken twice, so that its error is small beside the step's own spread.
    """
    part, g, channel, inside = _groups_and_part(G, S, GB, SP)
    for number in tl.range(part, tiles, programs, num_stages=STAGES):
        tile = number if tiles_ptr is None else tl.load(tiles_ptr + number)
        row, t, real = _steps(tile, length, T)
        there = real[:, None, None] & inside[None]
        x = _load_tile(x_ptr, row, t, channel, there, x_step, x_row)
        rough = tl.sum(x, 2) / S
        centred = x - rough[:, :, None]
        if S < SP:
            centred = tl.where(inside[None], centred, 0.0)
        rest = tl.sum(centred, 2) / S
        centred -= rest[:, :, None]
        if S < SP:
            centred = tl.where(inside[None], centred, 0.0)
        var = tl.sum(centred * centred, 2) / S
        mean = rough.to(tl.float64) + rest.to(tl.float64)
        places = _places_of(row, t, g, length, G)
        known = real[:, None] & (g < G)[None]
        tl.store(mean_ptr + places, mean, mask=known)
        tl.store(var_ptr + places, var, mask=known)


@triton.jit
def _segment(places_ptr, G: tl.constexpr):
    """A program's segment: where its group's steps begin, how many they are, those before them."""
    program = tl.program_id(0).to(tl.int64)
    place = places_ptr + program // G * 4
    return (
        program,
        tl.load(place) * G + program % G,
        tl.load(place + 1),
        tl.load(place + 2),
        tl.load(place + 3),
    )


@kernel
def scan_kernel(
    places_ptr,
    mean_ptr,
    var_ptr,
    mean_in,
    var_in,
    mean_out,
    var_out,
    length,
    RUNNING: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Of each step's mean and var makes those of all steps up to it, and gives the last.

    With a shift K, the sums S1 and S2 of (x - K) and (x - K)^2 over all scalars up to a step, both
    divided by D/G, give mean = K + S1/count and var = S2/count - (S1/count)^2. K is among the data,
    so (mean - K)^2 <= count * var, and the difference keeps its digits.
    """
    program, line, start, steps, position = _segment(places_ptr, G)
    base = line * length + start
    shift = tl.load(mean_ptr + base)
    s1 = tl.zeros([1], tl.float64)
    s2 = tl.zeros([1], tl.float64)
    if mean_in is not None:
        if position > 0:
            shift = tl.load(mean_in + program).to(tl.float64)
            s2 += position * tl.load(var_in + program).to(tl.float64)
    else:
        # Nothing came before, or it does not count.
        position *= 0
    for first in tl.range(0, steps, BLOCK, num_stages=STAGES):
        t = first + tl.arange(0, BLOCK)
        real = t < steps
        mean = tl.where(real, tl.load(mean_ptr + base + t, mask=real, other=0.0) - shift, 0.0)
        var = tl.load(var_ptr + base + t, mask=real, other=0.0).to(tl.float64)
        square = var + mean * mean
        share = 1.0 / (position + 1 + t).to(tl.float64)
        offset = (s1 + tl.cumsum(mean, 0)) * share
        spread = tl.maximum((s2 + tl.cumsum(square, 0)) * share - offset * offset, 0.0)
        s1 += tl.sum(mean, 0)
        s2 += tl.sum(square, 0)
        if RUNNING:
            tl.store(mean_ptr + base + t, offset + shift, mask=real)
            tl.store(var_ptr + base + t, spread.to(tl.float32), mask=real)
        end = t == steps - 1
        to = program + tl.zeros([BLOCK], tl.int64)
        tl.store(mean_out + to, (offset + shift).to(mean_out.dtype.element_ty), mask=end)
        tl.store(var_out + to, spread.to(var_out.dtype.element_ty), mask=end)


@kernel
def apply_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    x_step,
    x_row,
    y_step,
    y_row,
    length,
    tiles,
    programs,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """y of the running mean and var."""
    part, g, channel, inside = _groups_and_part(G, S, GB, SP)
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for tile in tl.range(part, tiles, programs, num_stages=STAGES):
        row, t, real = _steps(tile, length, T)
        there = real[:, None, None] & inside[None]
        x = _load_tile(x_ptr, row, t, channel, there, x_step, x_row)
        places = _places_of(row, t, g, length, G)
        known = real[:, None] & (g < G)[None]
        normed, _centred, _rstd = _normed(x, mean_ptr, var_ptr, places, known, eps)
        y = normed * gain[None] + bias[None]
        _store_tile(y_ptr, y, row, t, channel, there, y_step, y_row)


@kernel
def terms_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    to_mean_ptr,
    to_var_ptr,
    weight_parts,
    bias_parts,
    eps,
    x_step,
    x_row,
    grad_step,
    grad_row,
    length,
    tiles,
    programs,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """What y's gradient gives each step's mean and var, and a program's part of the parameters'."""
    part, g, channel, inside = _groups_and_part(G, S, GB, SP)
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    # One sum for each step of a tile: threads meet once, at the end.
    grad_weight = tl.zeros([T, GB, SP], tl.float32)
    grad_bias = tl.zeros([T, GB, SP], tl.float32)
    for tile in tl.range(part, tiles, programs, num_stages=STAGES):
        row, t, real = _steps(tile, length, T)
        there = real[:, None, None] & inside[None]
        x = _load_tile(x_ptr, row, t, channel, there, x_step, x_row)
        grad = _load_tile(grad_ptr, row, t, channel, there, grad_step, grad_row)
        places = _places_of(row, t, g, length, G)
        known = real[:, None] & (g < G)[None]
        # Where there is nothing it is no zero, but meets a gradient of zero.
        normed, _centred, rstd = _normed(x, mean_ptr, var_ptr, places, known, eps)
        gained = grad * gain[None]
        to_mean = -tl.sum(gained, 2) * rstd
        to_var = -0.5 * tl.sum(gained * normed, 2) * rstd * rstd
        tl.store(to_mean_ptr + places, to_mean, mask=known)
        tl.store(to_var_ptr + places, to_var, mask=known)
        grad_weight += grad * normed
        grad_bias += grad
    to = part * (G * S) + channel
    tl.store(weight_parts + to, tl.sum(grad_weight.to(tl.float64), 0), mask=inside)
    tl.store(bias_parts + to, tl.sum(grad_bias.to(tl.float64), 0), mask=inside)


@kernel
def scan_back_kernel(
    places_ptr,
    mean_ptr,
    first_ptr,
    second_ptr,
    mean_in,
    grad_mean_ptr,
    grad_var_ptr,
    grad_mean_in,
    grad_var_in,
    size,
    length,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Of gradients of each step's mean and var makes a line: x's gradient beside y's own.

    With A and V the running mean and variance of n steps and K a shift: v = dL/dV / n and
    a = dL/dA / n - 2 (A - K) v. A scalar x of step t gets sum (a + 2 (x - K) v) / (D/G) from step t
    and those after it: slope (x - A) + constant, with A rounded, and slope and constant take the
    place of dL/dV and dL/dA.
    """
    program, line, start, steps, position = _segment(places_ptr, G)
    base = line * length + start
    shift = tl.load(mean_ptr + base)
    if mean_in is not None:
        if position > 0:
            shift = tl.load(mean_in + program).to(tl.float64)
    grad_mean = tl.load(grad_mean_ptr + program).to(tl.float64)
    grad_var = tl.load(grad_var_ptr + program).to(tl.float64)
    sum_a = tl.zeros([1], tl.float64)
    sum_v = tl.zeros([1], tl.float64)
    for back in tl.range(0, tl.cdiv(steps, BLOCK), num_stages=STAGES):
        t = (tl.cdiv(steps, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        real = t < steps
        end = t == steps - 1
        mean = tl.load(mean_ptr + base + t, mask=real, other=0.0)
        to_mean = tl.load(first_ptr + base + t, mask=real, other=0.0).to(tl.float64)
        to_var = tl.load(second_ptr + base + t, mask=real, other=0.0).to(tl.float64)
        share = 1.0 / (position + 1 + t).to(tl.float64)
        v = (to_var + tl.where(end, grad_var, 0.0)) * share
        slope = 2.0 * (sum_v + tl.cumsum(v, 0, reverse=True)) / size
        a = (to_mean + tl.where(end, grad_mean, 0.0)) * share
        a = tl.where(real, a - 2.0 * (mean - shift) * v, 0.0)
        rounded = mean.to(tl.float32).to(tl.float64)
        constant = (sum_a + tl.cumsum(a, 0, reverse=True)) / size + slope * (rounded - shift)
        sum_a += tl.sum(a, 0)
        sum_v += tl.sum(v, 0)
        tl.store(first_ptr + base + t, constant.to(tl.float32), mask=real)
        tl.store(second_ptr + base + t, slope.to(tl.float32), mask=real)
    one = tl.arange(0, 1)
    fresh = position == 0
    to_mean = tl.where(fresh, 0.0, position * sum_a)
    to_var = tl.where(fresh, 0.0, position * sum_v)
    tl.store(grad_mean_in + program + one, to_mean.to(tl.float32))
    tl.store(grad_var_in + program + one, to_var.to(tl.float32))


@kernel
def input_gradient_kernel(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    constant_ptr,
    slope_ptr,
    eps,
    x_step,
    x_row,
    grad_step,
    grad_row,
    grad_x_step,
    grad_x_row,
    length,
    tiles,
    programs,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """grad_x = grad gain / deviation + slope (x - mean) + constant."""
    part, g, channel, inside = _groups_and_part(G, S, GB, SP)
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) + 1.0
    for tile in tl.range(part, tiles, programs, num_stages=STAGES):
        row, t, real = _steps(tile, length, T)
        there = real[:, None, None] & inside[None]
        x = _load_tile(x_ptr, row, t, channel, there, x_step, x_row)
        grad = _load_tile(grad_ptr, row, t, channel, there, grad_step, grad_row)
        places = _places_of(row, t, g, length, G)
        known = real[:, None] & (g < G)[None]
        constant = tl.load(constant_ptr + places, mask=known, other=0.0)[:, :, None]
        slope = tl.load(slope_ptr + places, mask=known, other=0.0)[:, :, None]
        _normed_x, centred, rstd = _normed(x, mean_ptr, var_ptr, places, known, eps)
        grad_x = grad * gain[None] * rstd[:, :, None] + centred * slope + constant
        _store_tile(grad_x_ptr, grad_x, row, t, channel, there, grad_x_step, grad_x_row)


@kernel
def spread_kernel(
    x_ptr,
    grad_x_ptr,
    owner_ptr,
    mean_ptr,
    slope_ptr,
    constant_ptr,
    x_step,
    x_row,
    grad_step,
    grad_row,
    length,
    tiles,
    programs,
    G: tl.constexpr,
    S: tl.constexpr,
    GB: tl.constexpr,
    SP: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """grad_x = slope (x - mean) + constant, the three of a step's segment; 0 of no segment."""
    part, g, channel, inside = _groups_and_part(G, S, GB, SP)
    for tile in tl.range(part, tiles, programs, num_stages=STAGES):
        row, t, real = _steps(tile, length, T)
        there = real[:, None, None] & inside[None]
        owner = tl.load(owner_ptr + row * length + t, mask=real, other=-1)
        places = owner.to(tl.int64)[:, None] * G + g[None]
        owned = (owner >= 0)[:, None] & (g < G)[None]
        x = _load_tile(x_ptr, row, t, channel, there & owned[:, :, None], x_step, x_row)
        mean = tl.load(mean_ptr + places, mask=owned, other=0.0)[:, :, None]
        slope = tl.load(slope_ptr + places, mask=owned, other=0.0)[:, :, None]
        constant = tl.load(constant_ptr + places, mask=owned, other=0.0)[:, :, None]
        grad_x = (x - mean) * slope + constant
        _store_tile(grad_x_ptr, grad_x, row, t, channel, there, grad_step, grad_row)
