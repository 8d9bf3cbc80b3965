"""Gates with plain torch operations, for any device."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..blocks import row_blocks


def gated_silu_portable(gate: Tensor, x: Tensor) -> Tensor:
    """Same arguments and result as `gated_silu`; nothing is checked here.

    On a CPU computing silu again for backward takes longer than keeping it.
    """
    return F.silu(gate) * x


def swiglu_portable(hidden: Tensor) -> Tensor:
    """Same argument and result as `swiglu`; nothing is checked here."""
    half = hidden.shape[-1] // 2
    return _SwiGLU.apply(hidden.reshape(-1, 2 * half)).view(*hidden.shape[:-1], half)


class _SwiGLU(torch.autograd.Function):
    """Of [rows, 2 F], in blocks that stay in a CPU's cache; the gradient is made in one piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(hidden)
        gate, x = hidden.chunk(2, dim=-1)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for rows in row_blocks(*hidden.shape, hidden.device):
            torch.ops.aten.silu.out(gate[rows], out=y[rows]).mul_(x[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:  # noqa: ANN401
        (hidden,) = ctx.saved_tensors
        gate, x = hidden.chunk(2, dim=-1)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        grad_gate, grad_x = grad_hidden.chunk(2, dim=-1)
        space = None
        for rows in row_blocks(*hidden.shape, hidden.device):
            grad = grad_y[rows]
            # One piece of memory for all blocks: it stays in the cache and in the process.
            space = torch.empty_like(grad) if space is None else space
            work = space[: len(grad)]
            torch.mul(grad, x[rows], out=work)
            torch.ops.aten.silu_backward.grad_input(work, gate[rows], grad_input=grad_gate[rows])
            torch.mul(torch.ops.aten.silu.out(gate[rows], out=work), grad, out=grad_x[rows])
        return grad_hidden
