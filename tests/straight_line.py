"""Megalodon in float64 straight from the equations, for tests: its naive operators, no Megatron.

Parameters come as a dict by the names of the model's state_dict, cast to float64 by the caller.
"""

import math

from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.chunked_attention import chunked_attention_naive
from megalodon_mcore.kernels.gates import gated_silu_naive, swiglu_naive
from megalodon_mcore.kernels.query_key import query_key_naive
from megalodon_mcore.kernels.row_norm import layer_norm_naive, rms_norm_naive
from megalodon_mcore.kernels.timestep_norm import timestep_norm_naive
from torch.nn.functional import silu


def timestep_norm(x, p, name, config, segments):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    y, _ = timestep_norm_naive(x, weight, bias, config.norm_num_groups, config.norm_eps, segments)
    return y


def block(x, p, config, segments=None):
    """One block on [length, batch, width]; `p` by names in the layer, a MegalodonConfig."""
    width, heads, eps = x.shape[-1], config.num_heads, config.norm_eps

    def linear(name, u):
        return u @ p[f"mixer.{name}.weight"].T + p[f"mixer.{name}.bias"]

    def by_head(u):
        return u.unflatten(-1, (heads, -1))

    t = timestep_norm(x, p, "mixer.timestep_norm", config, segments)
    coefficients = (p[f"mixer.cema.{n}"] for n in ("alpha", "delta", "theta", "gamma", "omega"))
    averages, _ = cema_naive(t, *coefficients, segments)
    m = rms_norm_naive(averages, p["mixer.cema_norm.weight"], eps)
    q, k = query_key_naive(
        by_head(linear("linear_z", m)),
        p["mixer.query_key.weight"],
        p["mixer.query_key.bias"],
        eps,
        config.rotary_base,
        config.chunk_size,
        segments,
    )
    v = silu(linear("linear_v", t))
    a, _ = chunked_attention_naive(q, k, by_head(v), config.chunk_size, segments)
    gated = gated_silu_naive(linear("linear_r", m), a.flatten(-2))
    projection = p["mixer.linear_proj.weight"]
    y = x + m @ projection[:, :width].T + p["mixer.linear_proj.bias"]
    y = y + gated @ projection[:, width:].T
    norm = p["feed_forward.norm.weight"], p["feed_forward.norm.bias"]
    hidden = layer_norm_naive(y, *norm, eps) @ p["feed_forward.linear_fc1.weight"].T
    hidden = swiglu_naive(hidden) if config.swiglu else silu(hidden)
    output = hidden @ p["feed_forward.linear_fc2.weight"].T
    if "feed_forward.rescale.weight" in p:
        output = output * p["feed_forward.rescale.weight"]
    return x + output


def model(tokens, p, config, segments=None):
    """Logits [batch, length, vocabulary] of int64 tokens [batch, length]."""
    embedding = p["embedding.word_embeddings.weight"]
    x = embedding[tokens.T]
    if config.scale_embedding:
        x = x * math.sqrt(x.shape[-1])
    for index in range(config.num_layers):
        prefix = f"decoder.layers.{index}."
        layer = {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}
        x = block(x, layer, config, segments)
    x = timestep_norm(x, p, "decoder.final_layernorm", config, segments)
    return (x @ p.get("output_layer.weight", embedding).T).transpose(0, 1)
