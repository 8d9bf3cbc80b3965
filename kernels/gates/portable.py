"""Gates with plain torch operations, for any device; fused where `fuse` says so."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..blocks import row_blocks
from ..fuse import fused, fuses


def gated_silu_portable(gate: Tensor, x: Tensor) -> Tensor:
    """Same arguments and result as `gated_silu`; nothing is checked here.

    On a CPU computing silu again for backward takes longer than keeping it, unless it is fused;
    elsewhere memory is what is short.
    """
    if gate.device.type == "cpu" and not fuses(gate):
        return F.silu(gate) * x
    return _GatedSiLU.apply(gate, x)


def swiglu_portable(hidden: Tensor) -> Tensor:
    """Same argument and result as `swiglu`; nothing is checked here."""
    half = hidden.shape[-1] // 2
    return _SwiGLU.apply(hidden.reshape(-1, 2 * half)).view(*hidden.shape[:-1], half)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return _gated(gate, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        return _gradients(gate, x, grad_y)


@fused
def _gated(gate: Tensor, x: Tensor) -> Tensor:
    return F.silu(gate) * x


@fused
def _gradients(gate: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * x, gate), F.silu(gate) * grad


class _SwiGLU(torch.autograd.Function):
    """Of [rows, 2 F], in blocks that stay in a CPU's cache; the gradient is made in one piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, x = hidden.chunk(2, dim=-1)
        if fuses(hidden):
            return _gated(gate, x)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for rows in row_blocks(len(hidden), hidden):
            torch.ops.aten.silu.out(gate[rows], out=y[rows]).mul_(x[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        if fuses(hidden):
            return _joint_gradient(hidden, grad_y)
        gate, x = hidden.chunk(2, dim=-1)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        grad_gate, grad_x = grad_hidden.chunk(2, dim=-1)
        space = None
        for rows in row_blocks(len(hidden), hidden):
            grad = grad_y[rows]
            # One piece of memory for all blocks: it stays in the cache and in the process.
            space = torch.empty_like(grad) if space is None else space
            work = space[: len(grad)]
            torch.mul(grad, x[rows], out=work)
            torch.ops.aten.silu_backward.grad_input(work, gate[rows], grad_input=grad_gate[rows])
            torch.mul(torch.ops.aten.silu.out(gate[rows], out=work), grad, out=grad_x[rows])
        return grad_hidden


@fused
def _joint_gradient(hidden: Tensor, grad: Tensor) -> Tensor:
    return torch.cat(_gradients.stage(*hidden.chunk(2, dim=-1), grad), dim=-1)
