"""CEMA as a scan over blocks of steps, in plain torch.

The whole is W x for every block (a GEMM batched over channels; `maps` has the letters), a scan over
the L/T states, and [K R] [x; h] for every block. The backward pass is the transposed map with time
reversed; the gradient of the map itself is one more GEMM, and ordinary autograd carries it on to
the parameters.

Channels are independent and are worked through in groups, and these in segments of time, so that
the rearranged copies of x stay in the cache and take a fraction of x's memory; backward saves
nothing but the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .maps import BlockMaps, as_complex

# Channels whose maps exist at a time, and elements of x that a CPU rearranges at a time.
GROUP_CHANNELS = 256
SEGMENT_ELEMENTS = 1 << 18


class BlockScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, delta, theta, gamma, omega, state, return_state):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state)
        ctx.return_state = return_state
        y = torch.empty_like(x)
        state_out = torch.empty_like(state) if return_state else None
        for group in _channel_groups(x.shape[2]):
            maps = BlockMaps.of(x, [a[group] for a in (alpha, delta, theta, gamma, omega)])
            cut = _Cut(x, maps)
            h = state[:, group].to(torch.complex128)
            z = None
            for steps in cut.segments:
                z = cut.gather(x[:, steps, group], z)
                z[..., cut.block :], h = cut.states(z, h)
                outputs = torch.bmm(cut.rows(z), maps.map[:, : cut.block].mT)
                cut.scatter(outputs, y[:, steps, group])
            if return_state:
                end = torch.bmm(z[-1].transpose(0, 1), maps.end_map.mT)
                state_out[:, group] = as_complex(end).transpose(0, 1)
        return y, state_out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state_out):  # noqa: ANN001, ANN205
        x, alpha, delta, theta, gamma, omega, state = ctx.saved_tensors
        params = (alpha, delta, theta, gamma, omega)
        grad_x, grad_state = torch.empty_like(x), torch.empty_like(state)
        grad_params = [torch.empty_like(a) for a in params]
        with torch.autocast(x.device.type, enabled=False):
            for group in _channel_groups(x.shape[2]):
                leaves = [a[group].detach().requires_grad_() for a in params]
                with torch.enable_grad():
                    maps = BlockMaps.of(x, leaves)
                cut = _Cut(x, maps)
                grad_end = grad_state_out[:, group] if ctx.return_state else None
                grad_map, grad_end_map = cut.backward(
                    x[..., group],
                    state[:, group],
                    grad_y[..., group],
                    grad_end,
                    grad_x[..., group],
                    grad_state[:, group],
                )
                outputs, gradients = [maps.map], [grad_map]
                if grad_end_map is not None:
                    outputs, gradients = [*outputs, maps.end_map], [*gradients, grad_end_map]
                grads = torch.autograd.grad(outputs, leaves, gradients)
                for whole, part in zip(grad_params, grads, strict=True):
                    whole[group] = part
        return grad_x, *grad_params, grad_state, None


class _Cut:
    """How a group of c channels of x is cut into blocks of T steps, and those into segments.

    A segment lies as z [K, batch, c, T+2N]: a block's T values, then the 2N numbers of the state
    before it. Segments bound what is rearranged at a time, so that it stays in the cache.
    """

    def __init__(self, x: Tensor, maps: BlockMaps) -> None:
        self.maps = maps
        self.batch, self.length, _ = x.shape
        self.channels, width, _ = maps.map.shape
        self.block = maps.block
        self.ndim = (width - self.block) // 2
        elements = SEGMENT_ELEMENTS if x.device.type == "cpu" else 1 << 26
        blocks = max(1, elements // max(1, self.batch * self.channels * self.block))
        stride = blocks * self.block
        self.segments = [
            slice(start, min(start + stride, self.length))
            for start in range(0, self.length, stride)
        ]

    def gather(self, x: Tensor, reuse: Tensor | None = None) -> Tensor:
        """x [batch, steps, c] into blocks; the place for the states is left unset."""
        t = self.block
        full, tail = divmod(x.shape[1], t)
        shape = (full + (tail > 0), self.batch, self.channels, t + 2 * self.ndim)
        z = reuse
        if z is None or z.shape != shape:
            z = torch.empty(shape, dtype=self.maps.map.dtype, device=x.device)
        z[:full, ..., :t] = x[:, : full * t].unflatten(1, (full, t)).permute(1, 0, 3, 2)
        if tail:
            z[full, ..., :tail] = x[:, full * t :].transpose(1, 2)
            z[full, ..., tail:t] = 0
        return z

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """One matrix per channel [c, K*batch, T] into out [batch, steps, c]."""
        y = y.unflatten(1, (-1, self.batch))
        full, tail = divmod(out.shape[1], self.block)
        blocks = out[:, : full * self.block].unflatten(1, (full, self.block))
        blocks.copy_(y[:, :full].permute(2, 1, 3, 0))
        if tail:
            out[:, full * self.block :] = y[:, full, :, :tail].permute(1, 2, 0)

    def rows(self, z: Tensor) -> Tensor:
        """[K, batch, c, m] as one matrix per channel, a view [c, K*batch, m]."""
        return z.flatten(0, 1).transpose(0, 1)

    def states(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The state before every block of a segment, and the one after all of them.

        z has the segment's values; h, complex128 [batch, c, N], is the state before the first
        block. Pairs [K, batch, c, 2N], and complex128.
        """
        t = self.block
        states = self._as_states(torch.bmm(self.rows(z[..., :t]), self.maps.map[:, t:, :t].mT))
        _scan(states, h, self.maps.q_block)
        before = z.new_empty(*z.shape[:3], 2 * self.ndim)
        before[0] = torch.view_as_real(h).flatten(2)
        before[1:] = torch.view_as_real(states[:-1]).flatten(3)
        return before, states[-1].clone()

    def _as_states(self, pairs: Tensor) -> Tensor:
        """[c, K*batch, 2N] as complex128 [K, batch, c, N]."""
        shape = (pairs.shape[1] // self.batch, self.batch, self.channels, self.ndim)
        states = torch.empty(shape, dtype=torch.complex128, device=pairs.device)
        torch.view_as_real(states).flatten(0, 1).flatten(2).copy_(pairs.transpose(0, 1))
        return states

    def backward(
        self,
        x: Tensor,
        state: Tensor,
        grad_y: Tensor,
        grad_end: Tensor | None,
        grad_x: Tensor,
        grad_state: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Fills grad_x and grad_state; returns the gradients of the map and of the end map.

        The gradient of [y; h_after] of every block stands in g: grad_y is given, and the rest
        comes from the later blocks by the scan with time reversed.
        """
        t, whole, end_map = self.block, self.maps.map, self.maps.end_map
        h, z, states = state.to(torch.complex128), None, []
        for steps in self.segments:
            z = self.gather(x[:, steps], z)
            before, h = self.states(z, h)
            states.append(before)

        grad_end_map = through_end = g = None
        if grad_end is not None:
            end = torch.view_as_real(grad_end.resolve_conj()).flatten(2).transpose(0, 1)
            last = torch.cat([z[-1, ..., :t], before[-1]], dim=-1)
            grad_end_map = torch.bmm(end.mT, last.transpose(0, 1))
            # [batch, c, T+2N]: what the last block's inputs and state get from the end state.
            through_end = torch.bmm(end, end_map).transpose(0, 1)

        grad_map = torch.zeros_like(whole)
        q_conj = self.maps.q_block.conj().resolve_conj()
        carry = torch.zeros_like(h)
        for steps in reversed(self.segments):
            z = self.gather(x[:, steps], z)
            z[..., t:] = states.pop()
            g = self.gather(grad_y[:, steps], g)
            grads = self._as_states(torch.bmm(self.rows(g[..., :t]), whole[:, :t, t:]))
            if through_end is not None:
                grads[-1] += as_complex(through_end[..., t:])
            _scan(grads, carry, q_conj, reverse=True)
            g[-1, ..., t:] = torch.view_as_real(carry).flatten(2)
            g[:-1, ..., t:] = torch.view_as_real(grads[1:]).flatten(3)
            carry = grads[0]
            grad_inputs = torch.bmm(self.rows(g), whole[..., :t])
            if through_end is not None:
                grad_inputs[:, -self.batch :] += through_end[..., :t].transpose(0, 1)
                through_end = None
            self.scatter(grad_inputs, grad_x[:, steps])
            grad_map.baddbmm_(self.rows(g).mT, self.rows(z))
        grad_state.copy_(carry)
        return grad_map, grad_end_map


def _scan(states: Tensor, h: Tensor, q: Tensor, reverse: bool = False) -> None:
    """states[k] += q * states[k - 1] in place, in order, with h before the first."""
    for state in reversed(states.unbind(0)) if reverse else states.unbind(0):
        torch.addcmul(state, h, q, out=state)
        h = state


def _channel_groups(channels: int) -> list[slice]:
    """Slices of at most GROUP_CHANNELS channels, whose maps exist at the same time."""
    starts = range(0, channels, GROUP_CHANNELS)
    return [slice(start, min(start + GROUP_CHANNELS, channels)) for start in starts]
