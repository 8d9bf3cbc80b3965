"""Gates in Triton: one pass forward, one backward, that computes the sigmoid again.

Tensors are [A, B, W] with any strides of A and B, so that a transposed one and half of a wider one
are taken where they lie.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import kernel, on_device_of, side_by_side

# Numbers of each tensor in a tile, and at most so many of them side by side.
TILE = 4096
COLUMNS = 1024


def gated_silu_triton(gate: Tensor, x: Tensor) -> Tensor:
    """Same arguments and result as `gated_silu`; nothing is checked here."""
    if gate.is_contiguous() and x.is_contiguous():
        rows = (-1, 1, gate.shape[-1])
    else:
        rows = (-1, *gate.shape[-2:])
    return _GatedSilu.apply(gate.reshape(rows), x.reshape(rows)).view(gate.shape)


def swiglu_triton(hidden: Tensor) -> Tensor:
    """Same argument and result as `swiglu`; nothing is checked here."""
    width = hidden.shape[-1]
    return _SwiGLU.apply(hidden.reshape(-1, 1, width)).view(*hidden.shape[:-1], width // 2)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        gate, x = side_by_side(gate), side_by_side(x)
        ctx.save_for_backward(gate, x)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(forward_kernel, gate, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
        _launch(backward_kernel, gate, x, side_by_side(grad_y), grad_gate, grad_x)
        return grad_gate, grad_x


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        hidden = side_by_side(hidden)
        ctx.save_for_backward(hidden)
        gate, x = hidden.chunk(2, dim=-1)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(forward_kernel, gate, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        _launch(
            backward_kernel,
            *(*hidden.chunk(2, dim=-1), side_by_side(grad_y), *grad_hidden.chunk(2, dim=-1)),
        )
        return grad_hidden


def _launch(kernel: Any, *tensors: Tensor) -> None:
    outer, inner, width = tensors[0].shape
    # The largest power of two in the width, so that no part of a tile is empty: 512 for 2560.
    columns = min(COLUMNS, width & -width)
    if columns < 128:
        columns = min(COLUMNS, triton.next_power_of_2(width))
    rows = max(1, min(TILE // columns, triton.next_power_of_2(outer * inner)))
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    with on_device_of(tensors[0]):
        kernel[(triton.cdiv(width, columns) * triton.cdiv(outer * inner, rows),)](
            *(*tensors, outer * inner, inner, *strides, width, columns, rows),
            num_warps=max(1, min(8, rows * columns // 512)),
        )


@triton.jit
def _tile(W: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr):
    """A program's rows and columns; programs side by side work on the same rows."""
    across: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // across) * R + tl.arange(0, R)
    return row, (program % across) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _at(row, inner, outer_stride, inner_stride, column):
    """Places of a tile [rows, columns] in a tensor [A, B, W] with these strides."""
    outer = row // inner
    within = row - outer * inner
    start = outer.to(tl.int64) * outer_stride + within.to(tl.int64) * inner_stride
    return start[:, None] + column[None]


@kernel
def forward_kernel(
    gate_ptr,
    x_ptr,
    y_ptr,
    rows,
    inner,
    gate_outer,
    gate_inner,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """y = gate sigmoid(gate) x of one tile."""
    row, column = _tile(W, COLUMNS, R)
    inside = (row < rows)[:, None] & (column < W)[None]
    gate_at = _at(row, inner, gate_outer, gate_inner, column)
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    x_at = _at(row, inner, x_outer, x_inner, column)
    x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * x
    y_at = _at(row, inner, y_outer, y_inner, column)
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def backward_kernel(
    gate_ptr,
    x_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_x_ptr,
    rows,
    inner,
    gate_outer,
    gate_inner,
    x_outer,
    x_inner,
    grad_outer,
    grad_inner,
    grad_gate_outer,
    grad_gate_inner,
    grad_x_outer,
    grad_x_inner,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """Gradients of gate and x of one tile; silu' = s (1 + gate (1 - s)), s = sigmoid(gate)."""
    row, column = _tile(W, COLUMNS, R)
    inside = (row < rows)[:, None] & (column < W)[None]
    gate_at = _at(row, inner, gate_outer, gate_inner, column)
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    x_at = _at(row, inner, x_outer, x_inner, column)
    x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    grad_at = _at(row, inner, grad_outer, grad_inner, column)
    grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * x * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    to = _at(row, inner, grad_gate_outer, grad_gate_inner, column)
    tl.store(grad_gate_ptr + to, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    to = _at(row, inner, grad_x_outer, grad_x_inner, column)
    grad_x = grad * (gate * sigmoid)
    tl.store(grad_x_ptr + to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
