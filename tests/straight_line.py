"""Megalodon in float64 straight from the equations, for tests: no kernels, no Megatron.

Parameters come as a dict by the names of the model's state_dict, cast to float64 by the caller.
"""

import math

import torch


def timestep_norm(x, weight, bias, groups, eps):
    batch, length, width = x.shape
    grouped = x.view(batch, length, groups, width // groups)
    outputs = []
    for t in range(length):
        seen = grouped[:, : t + 1].transpose(1, 2).flatten(2)
        mean = seen.mean(dim=-1, keepdim=True)
        variance = seen.var(dim=-1, correction=0, keepdim=True)
        outputs.append(((grouped[:, t] - mean) / (variance + eps).sqrt()).flatten(1))
    return torch.stack(outputs, dim=1) * (weight + 1) + bias


def cema(x, alpha, delta, theta, gamma, omega):
    ndim = alpha.shape[1]
    p = torch.sigmoid(alpha).squeeze(-1)
    magnitude = 1 - p * torch.sigmoid(delta).squeeze(-1)
    n = torch.arange(1, ndim + 1, dtype=x.dtype)
    phase = torch.sigmoid(theta).squeeze(-1) * 2 * math.pi / ndim * n
    q = torch.polar(magnitude, phase)
    output_weights = torch.view_as_complex(gamma)
    h = torch.zeros(x.shape[0], *q.shape, dtype=q.dtype)
    outputs = []
    for t in range(x.shape[1]):
        h = q * h + (p * x[:, t, :, None]).to(q.dtype)
        y = (output_weights * h).real.sum(-1) / math.sqrt(ndim)
        outputs.append(y + omega.squeeze(-1) * x[:, t])
    return torch.stack(outputs, dim=1)


def rms_norm(x, eps):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def layer_norm(x, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def rotate(x, base, chunk_size):
    """Rotates adjacent pairs of [batch, length, heads, width] by the position in the chunk."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[1]) % chunk_size
    frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = (position[:, None] * frequency)[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def attention(q, k, v, chunk_size):
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        q_c, k_c, v_c = (part[:, start : start + chunk_size].transpose(1, 2) for part in (q, k, v))
        length = q_c.shape[2]
        future = torch.ones(length, length).triu(1).bool()
        logits = (q_c @ k_c.transpose(-1, -2)).masked_fill(future, float("-inf"))
        outputs.append((logits.softmax(-1) @ v_c).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def silu(x):
    return x * torch.sigmoid(x)


def block(x, p, config):
    """One block on [batch, length, width]; `p` by names in the layer, a MegalodonConfig."""
    width, heads, eps = x.shape[-1], config.num_heads, config.norm_eps
    z_width = config.z_dim // heads
    t = timestep_norm(
        x,
        p["mixer.timestep_norm.weight"],
        p["mixer.timestep_norm.bias"],
        config.norm_num_groups,
        eps,
    )
    averages = cema(
        t, *(p[f"mixer.cema.{n}"] for n in ("alpha", "delta", "theta", "gamma", "omega"))
    )
    m = rms_norm(averages, eps) * (p["mixer.cema_norm.weight"] + 1)

    def linear(name, u):
        return u @ p[f"mixer.{name}.weight"].T + p[f"mixer.{name}.bias"]

    z = rms_norm(linear("linear_z", m).unflatten(-1, (heads, z_width)), eps).flatten(-2)
    scale = (p["mixer.query_key.weight"] + 1) / math.sqrt(z_width)
    q, k = (
        (z * scale[row] + p["mixer.query_key.bias"][row]).unflatten(-1, (heads, z_width))
        for row in (0, 1)
    )
    v = silu(linear("linear_v", t)).unflatten(-1, (heads, -1))
    r = silu(linear("linear_r", m))
    q, k = (rotate(part, config.rotary_base, config.chunk_size) for part in (q, k))
    a = attention(q, k, v, config.chunk_size).flatten(-2)
    projection = p["mixer.linear_proj.weight"]
    y = x + m @ projection[:, :width].T + p["mixer.linear_proj.bias"]
    y = y + (a * r) @ projection[:, width:].T
    u = layer_norm(y, eps) * (p["feed_forward.norm.weight"] + 1) + p["feed_forward.norm.bias"]
    first = p["feed_forward.linear_fc1.weight"]
    if config.swiglu:
        half = first.shape[0] // 2
        hidden = silu(u @ first[:half].T) * (u @ first[half:].T)
    else:
        hidden = silu(u @ first.T)
    output = hidden @ p["feed_forward.linear_fc2.weight"].T
    if "feed_forward.rescale.weight" in p:
        output = output * p["feed_forward.rescale.weight"]
    return x + output


def model(tokens, p, config):
    """Logits [batch, length, vocabulary] of int64 tokens [batch, length]."""
    embedding = p["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    if config.scale_embedding:
        x = x * math.sqrt(x.shape[-1])
    for index in range(config.num_layers):
        prefix = f"decoder.layers.{index}."
        layer = {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}
        x = block(x, layer, config)
    x = timestep_norm(
        x,
        p["decoder.final_layernorm.weight"],
        p["decoder.final_layernorm.bias"],
        config.norm_num_groups,
        config.norm_eps,
    )
    return x @ p.get("output_layer.weight", embedding).T
