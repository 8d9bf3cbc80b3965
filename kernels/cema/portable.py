"""CEMA as a block scan in plain torch, for any device.

Write h for the state as 2N real numbers per channel (real and imaginary parts interleaved). A
block of T steps is one linear map per channel,

    [ y_block ]   [ K  R ] [ x_block ]
    [ h_after ] = [ W  Q ] [ h_before ]

with K[i, j] = Re(sum_n gamma_n p_n q_n^(i-j)) / sqrt(N) for j <= i (plus omega on the diagonal),
R the response of the outputs to the incoming state, W what the inputs leave in the state, and Q
the multiplication by q^T. So the whole is: W x for every block (a GEMM batched over channels), a
scan over the L/T states, and [K R] [x; h] for every block. The backward pass is the transposed
map with time reversed; the gradient of the map itself is one more GEMM, and ordinary autograd
carries it on to the parameters.

Channels are independent and are worked through in groups, so that the rearranged copies of x
stay in the cache and take a fraction of x's memory; backward saves nothing but the inputs.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Steps in a block, halved where there are so few in all that building the maps costs most.
BLOCK = 64
FEW_STEPS = 4096
# Up to this length the plain recurrence costs less than building a block's map.
SHORT = 16
# Elements of x in one channel group; bounds on the channels in it. The lower one keeps the
# scan's launches few on long sequences, the upper one the maps in the cache.
GROUP_ELEMENTS = 1 << 20
GROUP_CHANNELS = (32, 128)


def coefficients(alpha: Tensor, delta: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence's p and, in polar form, its q: (p, log|q|, phase of q in turns).

    p_n = sigmoid(alpha_n) and q_n = (1 - sigmoid(alpha_n) sigmoid(delta_n))
    exp(2 pi i n sigmoid(theta) / N), n = 1..N (arXiv 2404.08801, section 3.1). alpha, delta:
    [D, N, 1]; theta: [D, 1, 1]. All results are float64 [D, N]: powers up to the sequence's
    length are taken of q, and a saturated sigmoid loses its gradient's digits in float32.
    """
    alpha, delta, theta = alpha.double(), delta.double(), theta.double()
    # 1 - ab = (1 - a) + a (1 - b): exact also where |q| is tiny, and never the log of zero.
    log_magnitude = torch.logaddexp(
        F.logsigmoid(-alpha), F.logsigmoid(alpha) + F.logsigmoid(-delta)
    )
    ndim = alpha.shape[1]
    n = torch.arange(1, ndim + 1, dtype=torch.float64, device=alpha.device)
    turns = torch.sigmoid(theta)[..., 0] * (n / ndim)
    return torch.sigmoid(alpha)[..., 0], log_magnitude[..., 0], turns


def powers(
    log_magnitude: Tensor, turns: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q^t for every t in exponents [M], from the results of coefficients [D, N]: complex [D, M, N].

    dtype is that of the real and imaginary parts. Phases are reduced in float64 first, so t may
    be as large as a sequence is long.
    """
    t = exponents.to(torch.float64)[:, None]
    phase = t * turns[:, None]
    phase = phase - phase.detach().round()
    magnitude = (t * log_magnitude[:, None]).to(dtype).exp()
    angle = (2 * math.pi * phase).to(dtype)
    # torch.polar's backward divides by the magnitude, which gives NaN where that is denormal.
    return torch.complex(magnitude * angle.cos(), magnitude * angle.sin())


def cema_portable(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema`: same arguments, unchecked."""
    batch, length, channels = x.shape
    if state is None:
        shape = (batch, channels, alpha.shape[1])
        state = torch.zeros(shape, dtype=_compute_dtype(x).to_complex(), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        if length <= SHORT:
            y, state_out = _recurrence(x, alpha, delta, theta, gamma, omega, state)
        else:
            y, state_out = _BlockScan.apply(
                x, alpha, delta, theta, gamma, omega, state, return_state
            )
    return y, state_out if return_state else None


def cema_response_portable(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """The torch path of :func:`megalodon_mcore.kernels.cema.cema_response`, unchecked."""
    with torch.autocast(state.device.type, enabled=False):
        # Backward saves the arguments alone: powers of every block take more than the result.
        return checkpoint(
            *(_response, state, alpha, delta, theta, gamma, length),
            use_reentrant=False,
            preserve_rng_state=False,
        )


def _response(
    state: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int
) -> Tensor:
    """y_t = Re(readout q^(t+1) h), q^(t+1) split into q^(block start) and q^(step + 1)."""
    batch, channels, ndim = state.shape
    real = state.dtype.to_real()
    block = min(BLOCK, length)
    blocks = -(-length // block)
    _, log_magnitude, turns = coefficients(alpha, delta, theta)
    starts = torch.arange(blocks, device=state.device) * block
    steps = torch.arange(1, block + 1, device=state.device)
    # [batch, D, blocks, N]: the state that every block starts with.
    h = state[:, :, None] * powers(log_magnitude, turns, starts, real)
    readout = torch.view_as_complex(gamma.contiguous())[:, None] / math.sqrt(ndim)
    readout = readout * powers(log_magnitude, turns, steps, real)
    # Re(c h) = Re(c) Re(h) - Im(c) Im(h), as one product per channel.
    response = torch.view_as_real(readout.conj().resolve_conj()).flatten(2)
    h = torch.view_as_real(h).flatten(3).transpose(0, 1).flatten(1, 2)
    y = torch.bmm(h, response.mT).view(channels, batch, blocks * block)
    return y.permute(1, 2, 0)[:, :length]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _recurrence(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The equations step by step, under ordinary autograd."""
    if x.shape[1] == 0:
        return x.clone(), state
    real = _compute_dtype(x)
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    p = p.to(real)
    # q and the products with it in double: decoding applies q once per token, and a rounded q
    # would compound over the tokens.
    q = torch.polar(log_magnitude.exp(), 2 * math.pi * turns)
    readout = torch.view_as_complex(gamma.contiguous()) / math.sqrt(alpha.shape[1])
    outputs = []
    for x_t in x.to(real).unbind(1):
        state = (q * state).to(real.to_complex()) + p * x_t[..., None]
        outputs.append((readout * state).real.sum(-1) + omega[:, 0] * x_t)
    return torch.stack(outputs, dim=1).to(x.dtype), state


class _BlockScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, delta, theta, gamma, omega, state, return_state):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state)
        ctx.return_state = return_state
        y = torch.empty_like(x)
        state_out = torch.empty_like(state) if return_state else None
        for group in _channel_groups(x):
            params = [a[group] for a in (alpha, delta, theta, gamma, omega)]
            plan = _Blocks(x, params)
            z = plan.inputs(x[..., group], state[:, group])
            plan.scatter(torch.bmm(plan.rows(z), plan.map[:, : plan.block].mT), y[..., group])
            if return_state:
                end = torch.bmm(z[:, -1].transpose(0, 1), plan.end_map.mT)
                state_out[:, group] = _as_complex(end).transpose(0, 1)
        return y, state_out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state_out):  # noqa: ANN001, ANN205
        x, alpha, delta, theta, gamma, omega, state = ctx.saved_tensors
        params = (alpha, delta, theta, gamma, omega)
        grad_x, grad_state = torch.empty_like(x), torch.empty_like(state)
        grad_params = [torch.empty_like(a) for a in params]
        with torch.autocast(x.device.type, enabled=False):
            for group in _channel_groups(x):
                leaves = [a[group].detach().requires_grad_() for a in params]
                with torch.enable_grad():
                    plan = _Blocks(x, leaves)
                grad_end = grad_state_out[:, group] if ctx.return_state else None
                z = plan.inputs(x[..., group], state[:, group])
                maps = [plan.map, plan.end_map] if ctx.return_state else [plan.map]
                grad_maps = plan.backward(
                    z, grad_y[..., group], grad_end, grad_x[..., group], grad_state[:, group]
                )
                grads = torch.autograd.grad(maps, leaves, grad_maps)
                for whole, part in zip(grad_params, grads, strict=True):
                    whole[group] = part
        return grad_x, *grad_params, grad_state, None


class _Blocks:
    """The block map of one group of c channels, and how x is cut into K blocks of T steps.

    Sequences lie as [batch, K, c, T+2N]: a block's T values, then the 2N numbers of a state.
    """

    def __init__(self, x: Tensor, params: list[Tensor]) -> None:
        alpha, delta, theta, gamma, omega = params
        self.batch, self.length, _ = x.shape
        self.channels, self.ndim = alpha.shape[:2]
        self.real = _compute_dtype(x)
        block = BLOCK if self.batch * self.length > FEW_STEPS else BLOCK // 2
        # Even, so that the pairs after the block's values can be viewed as complex numbers.
        self.block = min(block, self.length + self.length % 2)
        self.full_blocks, self.tail = divmod(self.length, self.block)
        self.blocks = self.full_blocks + (self.tail > 0)

        p, log_magnitude, turns = coefficients(alpha, delta, theta)
        steps = torch.arange(self.block + 1, device=x.device)
        q_powers = powers(log_magnitude, turns, steps, self.real)
        self.map = _block_map(p.to(self.real), q_powers, gamma, omega)
        # The state after the last step: from a whole block, or from one of only `tail` steps.
        self.end_map = self.map[:, self.block :]
        if self.tail:
            write = self.end_map[..., self.block - self.tail : self.block]
            gap = write.new_zeros(*write.shape[:2], self.block - self.tail)
            self.end_map = torch.cat([write, gap, _rotation(q_powers[:, self.tail])], dim=-1)
        # Double in the scan: a rounded q^T would compound over the blocks.
        with torch.no_grad():
            self.q_block = powers(log_magnitude, turns, steps[-1:], torch.float64)[:, 0]

    def rows(self, z: Tensor) -> Tensor:
        """[batch, K, c, m] as one matrix per channel, [c, batch*K, m]."""
        return z.flatten(0, 1).transpose(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """x [batch, length, c] into new blocks; the place for the states is left unset."""
        t, full = self.block, self.full_blocks
        shape = (self.batch, self.blocks, self.channels, t + 2 * self.ndim)
        z = torch.empty(shape, dtype=self.real, device=x.device)
        z[:, :full, :, :t] = x[:, : full * t].unflatten(1, (full, t)).transpose(2, 3)
        if self.tail:
            z[:, full, :, : self.tail] = x[:, full * t :].transpose(1, 2)
            z[:, full, :, self.tail : t] = 0
        return z

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """One matrix per channel [c, batch*K, T] into out [batch, length, c]."""
        t, full = self.block, self.full_blocks
        y = y.unflatten(1, (self.batch, self.blocks)).permute(1, 2, 0, 3)
        out[:, : full * t].unflatten(1, (full, t)).copy_(y[:, :full].transpose(2, 3))
        if self.tail:
            out[:, full * t :] = y[:, full, :, : self.tail].transpose(1, 2)

    def inputs(self, x: Tensor, state: Tensor) -> Tensor:
        """[x; h_before] of every block, from x and the state before the first step."""
        t = self.block
        z = self.gather(x)
        h_before = _as_complex(z[..., t:])
        h = state.to(torch.complex128)
        h_before[:, 0] = h
        if self.blocks > 1:
            written = _as_complex(torch.bmm(self.rows(z[..., :t]), self.map[:, t:, :t].mT))
            written = written.unflatten(1, (self.batch, self.blocks))
            for k in range(self.blocks - 1):
                h = h * self.q_block + written[:, :, k].transpose(0, 1)
                h_before[:, k + 1] = h
        return z

    def backward(
        self,
        z: Tensor,
        grad_y: Tensor,
        grad_end: Tensor | None,
        grad_x: Tensor,
        grad_state: Tensor,
    ) -> list[Tensor]:
        """Fill grad_x and grad_state; return the gradients of the maps.

        The gradient of [y; h_after] of every block stands in g: grad_y is given, and the rest
        comes from the later blocks by the scan with time reversed.
        """
        t = self.block
        g = self.gather(grad_y)
        g_after = _as_complex(g[..., t:])
        g_after[:, -1] = 0
        h = torch.zeros_like(grad_state, dtype=torch.complex128)
        if grad_end is not None:
            end = torch.view_as_real(grad_end.resolve_conj()).flatten(2).transpose(0, 1)
            # [c, batch, T+2N]: what the last block's inputs and state get from the end state.
            through_end = torch.bmm(end, self.end_map)
            h += _as_complex(through_end[..., t:]).transpose(0, 1)

        read = _as_complex(torch.bmm(self.rows(g[..., :t]), self.map[:, :t, t:]))
        read = read.unflatten(1, (self.batch, self.blocks))
        h += read[:, :, -1].transpose(0, 1)
        q_conj = self.q_block.conj().resolve_conj()
        for k in reversed(range(self.blocks - 1)):
            g_after[:, k] = h
            h = h * q_conj + read[:, :, k].transpose(0, 1)
        grad_state.copy_(h)

        grad_inputs = torch.bmm(self.rows(g), self.map[..., :t])
        if grad_end is not None:
            grad_inputs[:, self.blocks - 1 :: self.blocks] += through_end[..., :t]
        self.scatter(grad_inputs, grad_x)
        grad_map = torch.bmm(self.rows(g).mT, self.rows(z))
        if grad_end is None:
            return [grad_map]
        return [grad_map, torch.bmm(end.mT, z[:, -1].transpose(0, 1))]


def _as_complex(pairs: Tensor) -> Tensor:
    """[..., 2N] interleaved real and imaginary parts as complex [..., N], a view."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


@lru_cache
def _toeplitz_basis(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 0/1 matrix [T, T*T] that lays T taps out as a lower-triangular Toeplitz matrix."""
    # An inference tensor in the cache could not be used in a backward pass later.
    with torch.inference_mode(False):
        i = torch.arange(block, device=device)
        lag = i[:, None] - i[None, :]
        return (lag == i[:, None, None]).flatten(1).to(dtype)


def _rotation(q: Tensor) -> Tensor:
    """Multiplication by q [c, N] as a real matrix on interleaved pairs: [c, 2N, 2N]."""
    real, imag = q.real, q.imag
    two_by_two = torch.stack([torch.stack([real, -imag]), torch.stack([imag, real])])
    # [2, 2, c, N] -> [c, 2, 2, N] -> the N on a diagonal: [c, N, 2, N, 2]
    matrix = torch.diag_embed(two_by_two.permute(2, 0, 1, 3), dim1=1, dim2=3)
    return matrix.flatten(3, 4).flatten(1, 2)


def _block_map(p: Tensor, q_powers: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    """[[K, R], [W, Q]] of every channel, [c, T+2N, T+2N], from q^0..q^T [c, T+1, N]."""
    block, ndim = q_powers.shape[1] - 1, q_powers.shape[2]
    p = p[:, None]
    readout = torch.view_as_complex(gamma.contiguous())[:, None] / math.sqrt(ndim) * q_powers
    taps = (p * readout.real)[:, :block].sum(-1)
    taps = torch.cat([taps[:, :1] + omega, taps[:, 1:]], dim=1)
    basis = _toeplitz_basis(block, taps.dtype, taps.device)
    within = (taps @ basis).unflatten(1, (block, block))
    # y takes Re(c h) = Re(c) Re(h) - Im(c) Im(h).
    response = torch.view_as_real(readout[:, 1:].conj().resolve_conj()).flatten(2)
    write = torch.view_as_real((p * q_powers[:, :block]).flip(1)).permute(0, 2, 3, 1).flatten(1, 2)
    outputs = torch.cat([within, response], dim=2)
    states = torch.cat([write, _rotation(q_powers[:, block])], dim=2)
    return torch.cat([outputs, states], dim=1)


def _channel_groups(x: Tensor) -> list[slice]:
    batch, length, channels = x.shape
    fewest, most = GROUP_CHANNELS
    size = min(max(GROUP_ELEMENTS // max(batch * length, 1), fewest), most)
    return [slice(d, min(d + size, channels)) for d in range(0, channels, size)]
