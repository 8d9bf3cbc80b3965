"""What Megalodon's operators are compared with: a plain FFT, megalodon-hf and megalodon-jax."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megalodon_mcore.kernels.cema import coefficients, powers
from torch import Tensor
from torch.nn import functional

from operators import EPS, Shape


def cema_by_fft(
    x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> Tensor:
    """CEMA of [length, batch, D] as one convolution with its response, by torch.fft."""
    length = len(x)
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    readout = torch.view_as_complex(gamma) * p.float() / math.sqrt(alpha.shape[1])
    steps = torch.arange(length, device=x.device)
    response = torch.zeros(x.shape[2], length, device=x.device)
    for n in range(alpha.shape[1]):
        q = powers(log_magnitude[:, n : n + 1], turns[:, n : n + 1], steps)[..., 0]
        response = response + (readout[:, n : n + 1] * q).real
    size = 2 * length
    spectrum = torch.fft.rfft(x.permute(1, 2, 0), n=size) * torch.fft.rfft(response, n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., :length].permute(2, 0, 1)
    return y + omega[:, 0] * x


def attention_by_split_heads(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Chunked attention by scaled_dot_product_attention, which wants values as wide as keys.

    The value columns are cut into heads of the keys' width, which share their q and k; the length
    is a multiple of the chunk.
    """
    length, batch, heads, width = q.shape
    parts = v.shape[-1] // width
    q, k = (z.repeat_interleave(parts, dim=2) for z in (q, k))
    v = v.unflatten(-1, (parts, width)).flatten(2, 3)
    # [chunks * batch, heads, chunk, width]
    q, k, v = (z.unflatten(0, (-1, chunk)).permute(0, 2, 3, 1, 4).flatten(0, 1) for z in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    out = out.unflatten(0, (-1, batch)).permute(0, 3, 1, 2, 4)
    return out.reshape(length, batch, heads, parts * width)


class _Panels(torch.autograd.Function):
    """Causal attention of [n, C, d] by batched products over panels of rows, weights taken anew."""

    PANEL = 512

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for rows, weights in _Panels.weights(q, k):
            torch.bmm(weights, v[:, : rows.stop], out=out[:, rows])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (out * grad).sum(-1, keepdim=True)
        for rows, weights in _Panels.weights(q, k):
            seen = slice(rows.stop)
            scores = weights * (torch.bmm(grad[:, rows], v[:, seen].mT) - delta[:, rows])
            torch.bmm(scores, k[:, seen], out=grad_q[:, rows])
            grad_k[:, seen].baddbmm_(scores.mT, q[:, rows])
            grad_v[:, seen].baddbmm_(weights.mT, grad[:, rows])
        return grad_q, grad_k, grad_v

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The softmax of each panel, in q's type."""
        for start in range(0, q.shape[1], _Panels.PANEL):
            rows = slice(start, min(start + _Panels.PANEL, q.shape[1]))
            scores = torch.bmm(q[:, rows], k[:, : rows.stop].mT)
            size = rows.stop - start
            future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, start:].masked_fill_(future, -torch.inf)
            yield rows, scores.softmax(-1)


def attention_by_panels(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Chunked attention by plain products in the inputs' type; whole chunks alone."""
    batch, heads = q.shape[1:3]
    packed = (
        z.unflatten(0, (-1, chunk)).permute(2, 0, 3, 1, 4).flatten(0, 2).contiguous()
        for z in (q, k, v)
    )
    out = _Panels.apply(*packed)
    return out.unflatten(0, (batch, -1, heads)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (weight + 1)


def _timestep_norm(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    scalars = x.float().unflatten(-1, (shape.groups, -1))
    steps = torch.arange(1, len(x) + 1, device=x.device)[:, None, None]
    mean = (scalars.mean(-1).cumsum(0) / steps)[..., None]
    var = (scalars.square().mean(-1).cumsum(0) / steps)[..., None] - mean.square()
    normed = ((scalars - mean) * torch.rsqrt(var + EPS)).flatten(-2)
    return ((normed * (weight + 1) + bias).to(x.dtype),)


def _query_key(shape: Shape, z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    width = z.shape[-1]
    scale, shift = (w.unflatten(-1, (-1, width)) for w in (weight, bias))
    normed = _rms_norm(z, torch.zeros((), device=z.device)) / math.sqrt(width)
    frequency = 1e4 ** (-torch.arange(0, width, 2, device=z.device) / width)
    position = torch.arange(len(z), device=z.device) % shape.chunk
    turn = (position[:, None] * frequency)[:, None, None]
    cos, sin = turn.cos(), turn.sin()
    results = []
    for row in range(2):
        even, odd = (normed * (scale[row] + 1) + shift[row]).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        results.append(turned.flatten(-2).to(z.dtype))
    return tuple(results)


# What torch.compile is given: the operators as one would write them down, in float32 inside.
PLAIN: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "TimestepNorm": _timestep_norm,
    "RMSNorm": lambda shape, x, weight: (_rms_norm(x, weight).to(x.dtype),),
    "LayerNorm": lambda shape, x, weight, bias: (
        functional.layer_norm(x.float(), x.shape[-1:], weight + 1, bias, EPS).to(x.dtype),
    ),
    "query and key": _query_key,
    "gate": lambda shape, gate, x: ((functional.silu(gate.float()) * x).to(x.dtype),),
    "SwiGLU": lambda shape, hidden: (
        (functional.silu(hidden.chunk(2, -1)[0].float()) * hidden.chunk(2, -1)[1]).to(hidden.dtype),
    ),
}


def megalodon_hf(folder: Path) -> Any:
    """The package of a checkout of github.com/pszemraj/megalodon-hf."""
    sys.path.insert(0, str(folder / "src"))
    import megalodon

    return megalodon


def megalodon_hf_model(package: Any, sizes: dict[str, int]) -> torch.nn.Module:
    """Its model of the given sizes."""
    return package.MegalodonForCausalLM(
        package.MegalodonConfig(
            vocab_size=sizes["vocabulary"],
            model_dim=sizes["hidden_size"],
            num_layers=sizes["layers"],
            num_heads=1,
            z_dim=sizes["z_dim"],
            value_dim=sizes["value_dim"],
            ffn_hidden_dim=sizes["ffn"],
            cema_ndim=16,
            chunk_size=sizes["chunk"],
            norm_num_groups=sizes["groups"],
        )
    )


def has_megalodon_jax() -> bool:
    """Whether megalodon-jax and what it needs are installed."""
    return all(importlib.util.find_spec(name) for name in ("equinox", "jax", "megalodon_jax"))


def megalodon_jax_step(sizes: dict[str, int], batch: int, length: int) -> Any:
    """A compiled forward and backward pass of megalodon-jax."""
    import equinox
    import jax
    import megalodon_jax

    config = megalodon_jax.MegalodonConfig(
        vocab_size=sizes["vocabulary"],
        model_dim=sizes["hidden_size"],
        num_layers=sizes["layers"],
        num_heads=1,
        z_dim=sizes["z_dim"],
        value_dim=sizes["value_dim"],
        ffn_hidden_dim=sizes["ffn"],
        cema_ndim=16,
        chunk_size=sizes["chunk"],
        norm_num_groups=sizes["groups"],
    )
    model = megalodon_jax.MegalodonForCausalLM(config, key=jax.random.key(0))
    tokens = torch.randint(sizes["vocabulary"], (batch, length)).numpy()
    step = equinox.filter_jit(
        equinox.filter_value_and_grad(lambda model: model.compute_loss(tokens, tokens))
    )
    return lambda: jax.block_until_ready(step(model))
