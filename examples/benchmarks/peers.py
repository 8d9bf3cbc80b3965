"""What Megalodon's operators are compared with: a plain FFT, megalodon-hf and megalodon-jax."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import torch
from megalodon_mcore.kernels.cema import coefficients, powers
from torch import Tensor


def cema_by_fft(
    x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> Tensor:
    """CEMA of [batch, length, D] as one convolution with its response, by torch.fft."""
    length = x.shape[1]
    p, log_magnitude, turns = coefficients(alpha, delta, theta)
    readout = torch.view_as_complex(gamma) * p.float() / math.sqrt(alpha.shape[1])
    steps = torch.arange(length, device=x.device)
    response = torch.zeros(x.shape[2], length, device=x.device)
    for n in range(alpha.shape[1]):
        q = powers(log_magnitude[:, n : n + 1], turns[:, n : n + 1], steps)[..., 0]
        response = response + (readout[:, n : n + 1] * q).real
    size = 2 * length
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(response, n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., :length].transpose(1, 2)
    return y + omega[:, 0] * x


def attention_by_split_heads(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Chunked attention by scaled_dot_product_attention, which wants values as wide as keys.

    The value columns are cut into heads of the keys' width, which share their q and k; the length
    is a multiple of the chunk.
    """
    batch, length, heads, width = q.shape
    parts = v.shape[-1] // width
    q, k = (z.repeat_interleave(parts, dim=2) for z in (q, k))
    v = v.unflatten(-1, (parts, width)).flatten(2, 3)
    q, k, v = (z.unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for z in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return out.transpose(1, 2).reshape(batch, length, heads, parts * width)


def megalodon_hf(folder: Path) -> Any:  # noqa: ANN401
    """The package of a checkout of github.com/pszemraj/megalodon-hf."""
    sys.path.insert(0, str(folder / "src"))
    import megalodon

    return megalodon


def megalodon_hf_model(package: Any, sizes: dict[str, int]) -> torch.nn.Module:  # noqa: ANN401
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


def megalodon_jax_step(sizes: dict[str, int], batch: int, length: int) -> Any:  # noqa: ANN401
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
