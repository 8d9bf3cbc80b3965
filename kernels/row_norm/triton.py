"""RMSNorm and LayerNorm in Triton: a tile is a few whole rows, which stay in registers.

Programs walk a stretch of rows each, with the parameters in registers. Forward reads x and writes
y, and one or two numbers a row. Backward reads x and the gradient once, recomputes the rest and
writes the gradient of x; its programs add up what the parameters get in registers, which torch
then sums over the programs, in a fixed order. Backward spills from 16,384 channels on.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side

# Numbers in a tile: enough bytes in flight, few enough to stay in registers.
TILE = 4096
# Tiles at most of which one is worked on and the rest are on their way from memory, and the bytes
# of x at most that those take, in shared memory: twice as many with the gradient.
STAGES = 3
AHEAD = 2**15
# Programs of the backward pass: they fill a card, and what they leave to be summed is little.
# Forward, which leaves nothing and has less to load at a time, has twice as many.
PROGRAMS = 256


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `rms_norm` for x [A, B, D]; nothing is checked here."""
    return _RowNorm.apply(x, weight, None, eps)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Same arguments and result as `layer_norm` for x [A, B, D]; nothing is checked here."""
    return _RowNorm.apply(x, weight, bias, eps)


class Tiling(NamedTuple):
    """How rows [A * B, D] are cut: tiles of `rows` rows, `segment` tiles for a program."""

    rows: int
    padded: int
    tiles: int
    segment: int
    programs: int
    warps: int
    stages: int

    @classmethod
    def of(cls, x: Tensor, programs: int) -> "Tiling":
        """Cut for x [A, B, D] and so many programs at most."""
        count = x.shape[0] * x.shape[1]
        padded = triton.next_power_of_2(x.shape[2])
        rows = max(1, min(TILE // padded, triton.next_power_of_2(count)))
        tiles = triton.cdiv(count, rows)
        segment = triton.cdiv(tiles, programs)
        warps = min(16, max(1, rows * padded // 512))
        stages = min(STAGES, 1 + AHEAD // (rows * padded * x.element_size()))
        return cls(rows, padded, tiles, segment, triton.cdiv(tiles, segment), warps, stages)


class _RowNorm(torch.autograd.Function):
    """LayerNorm, or without a bias RMSNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        x, weight = side_by_side(x), weight.contiguous()
        outer, inner, channels = x.shape
        tiling = Tiling.of(x, 2 * PROGRAMS)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(outer, inner, dtype=torch.float32, device=x.device)
        centred = bias is not None
        mean = torch.empty_like(rstd) if centred else rstd
        with on_device_of(x):
            forward_kernel[(tiling.programs,)](
                *(x, y, weight, bias.contiguous() if centred else weight, mean, rstd),
                *(outer * inner, inner, tiling.segment, eps, *x.stride()[:2]),
                *(channels, tiling.padded, tiling.rows, centred, tiling.stages),
                num_warps=tiling.warps,
            )
        ctx.save_for_backward(x, weight, rstd, *([mean] if centred else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, rstd, *mean = ctx.saved_tensors
        centred = bool(mean)
        grad_y = side_by_side(grad_y)
        outer, inner, channels = x.shape
        tiling = Tiling.of(x, PROGRAMS)
        grad_x = torch.empty_like(x)
        partial = torch.empty(
            tiling.programs, 1 + centred, channels, dtype=torch.float32, device=x.device
        )
        with on_device_of(x):
            backward_kernel[(tiling.programs,)](
                *(x, grad_y, weight, mean[0] if centred else rstd, rstd, grad_x, partial),
                *(outer * inner, inner, tiling.segment),
                *(*x.stride()[:2], *grad_y.stride()[:2], *grad_x.stride()[:2]),
                *(channels, tiling.padded, tiling.rows, centred, tiling.stages),
                num_warps=tiling.warps,
            )
            grad_weight, *grad_bias = partial.sum(0).to(weight.dtype).unbind(0)
        return grad_x, grad_weight, grad_bias[0] if centred else None, None


@triton.jit
def _rows(row, inner, outer_stride, inner_stride):
    """Where rows of [A, B, D] start, of a tensor with these strides."""
    outer = row // inner
    within = row - outer * inner
    return outer.to(tl.int64) * outer_stride + within.to(tl.int64) * inner_stride


@kernel
def forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    inner,
    segment,
    eps,
    x_outer,
    x_inner,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """y of this program's rows, and their 1/deviation (1/rms) and mean."""
    program = tl.program_id(0)
    channel = tl.arange(0, DP)
    gain = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32) + 1.0
    if CENTRED:
        bias = tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    last = tl.minimum((program + 1) * segment, tl.cdiv(rows, R))
    for tile in tl.range(program * segment, last, num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (channel < D)[None]
        at = _rows(row, inner, x_outer, x_inner)[:, None] + channel[None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(x, 1) / D
            tl.store(mean_ptr + row, mean, mask=row < rows)
            x = tl.where(inside, x - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / D + eps))
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        y = x * rstd[:, None] * gain[None]
        if CENTRED:
            y += bias[None]
        to = row.to(tl.int64)[:, None] * D + channel[None]
        tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def backward_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial,
    rows,
    inner,
    segment,
    x_outer,
    x_inner,
    grad_outer,
    grad_inner,
    grad_x_outer,
    grad_x_inner,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The gradient of x, and this program's share of those of weight and bias.

    With n the normalized x and g = gain dL/dy: dL/dx = rstd (g - n mean(g n)), and where n is
    centred also less mean(g).
    """
    program = tl.program_id(0)
    channel = tl.arange(0, DP)
    gain = tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32) + 1.0
    grad_weight = tl.zeros([R, DP], tl.float32)
    grad_bias = tl.zeros([R, DP], tl.float32)
    last = tl.minimum((program + 1) * segment, tl.cdiv(rows, R))
    for tile in tl.range(program * segment, last, num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (channel < D)[None]
        at = _rows(row, inner, x_outer, x_inner)[:, None] + channel[None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = _rows(row, inner, grad_outer, grad_inner)[:, None] + channel[None]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            x = tl.where(inside, x - mean, 0.0)
            grad_bias += grad
        normed = x * rstd
        grad_weight += grad * normed
        grad = grad * gain[None]
        grad_x = grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]
        if CENTRED:
            grad_x -= (tl.sum(grad, 1) / D)[:, None]
        to = _rows(row, inner, grad_x_outer, grad_x_inner)[:, None] + channel[None]
        tl.store(grad_x_ptr + to, (grad_x * rstd).to(grad_x_ptr.dtype.element_ty), mask=inside)
    if CENTRED:
        to = partial + program.to(tl.int64) * 2 * D + channel
        tl.store(to, tl.sum(grad_weight, 0), mask=channel < D)
        tl.store(to + D, tl.sum(grad_bias, 0), mask=channel < D)
    else:
        to = partial + program.to(tl.int64) * D + channel
        tl.store(to, tl.sum(grad_weight, 0), mask=channel < D)
