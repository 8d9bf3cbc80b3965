"""Megalodon in float64 straight from the equations, for tests: its naive operators, no Megatron.

Parameters come as a dict by the names of the model's state_dict, cast to float64 by the caller.
"""

import math

import torch
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.chunked_attention import chunked_attention_naive
from megalodon_mcore.kernels.gates import gated_silu_naive, swiglu_naive
from megalodon_mcore.kernels.query_key import query_key_naive
from megalodon_mcore.kernels.row_norm import layer_norm_naive, rms_norm_naive
from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.kernels.timestep_norm import timestep_norm_naive
from torch.nn.functional import silu


def timestep_norm(x, p, name, config, segments):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    y, _ = timestep_norm_naive(x, weight, bias, config.norm_num_groups, config.norm_eps, segments)
    return y


def block(x, p, config, segments=None, top=2):
    """One block on [length, batch, width]; `p` by names in the layer, a MegalodonConfig.

    If it has a router, its feed-forward network is a mixture of the `top` best experts.
    """
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
    u = layer_norm_naive(y, *norm, eps)
    if "feed_forward.experts.router.weight" in p:
        output = mixture(u, p, "feed_forward.experts.", top, config.swiglu)
    else:
        output = _mlp(u, p, "feed_forward.", config.swiglu)
    if "feed_forward.rescale.weight" in p:
        output = output * p["feed_forward.rescale.weight"]
    return x + output


def attention(x, p, config, segments, heads, groups):
    """A layer of attention over whole documents, its RoPE in halves; `p` by names in the layer."""
    segments = segments or Segments.of_rows(*x.shape[:2])
    u = rms_norm_naive(x, p["input_layernorm.weight"], config.norm_eps)
    # Megatron has the heads of a group beside that group's key and value.
    qkv = (u @ p["self_attention.linear_qkv.weight"].T).unflatten(-1, (groups, -1))
    width = qkv.shape[-1] // (heads // groups + 2)
    output = torch.empty(*x.shape[:2], heads * width, dtype=x.dtype)
    powers = config.rotary_base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    for row, start, length, position in segments:
        angles = torch.arange(position, position + length, dtype=x.dtype)[:, None] * powers
        cos, sin = angles.cos(), angles.sin()

        def turned(z, cos=cos, sin=sin):
            first, second = z.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        for head in range(heads):
            own = qkv[start : start + length, row, head // (heads // groups)].unflatten(
                -1, (-1, width)
            )
            q, k, v = own[:, head % (heads // groups)], own[:, -2], own[:, -1]
            scores = turned(q) @ turned(k).T / math.sqrt(width)
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            output[start : start + length, row, head * width : (head + 1) * width] = weights @ v
    return x + output @ p["self_attention.linear_proj.weight"].T


def mlp(x, p, config):
    """A layer with an MLP alone."""
    u = rms_norm_naive(x, p["pre_mlp_layernorm.weight"], config.norm_eps)
    return x + _mlp(u, p, "mlp.")


def experts(x, p, config, top):
    """A layer with a mixture of experts alone."""
    u = rms_norm_naive(x, p["pre_mlp_layernorm.weight"], config.norm_eps)
    return x + mixture(u, p, "mlp.", top)


def mixture(u, p, name, top, swiglu=True):
    """The `top` best experts for each token, weighted by the softmax of their scores.

    A shared expert sees all tokens.
    """
    scores, chosen = (u @ p[f"{name}router.weight"].T).topk(top, -1)
    weights, output = scores.softmax(-1), torch.zeros_like(u)
    for number in range(len(p[f"{name}router.weight"])):
        share = (weights * (chosen == number)).sum(-1, keepdim=True)
        output = output + share * _mlp(u, p, f"{name}experts.local_experts.{number}.", swiglu)
    if f"{name}shared_experts.linear_fc1.weight" in p:
        output = output + _mlp(u, p, f"{name}shared_experts.", swiglu)
    return output


def _mlp(x, p, name, swiglu=True):
    hidden = x @ p[f"{name}linear_fc1.weight"].T
    hidden = swiglu_naive(hidden) if swiglu else silu(hidden)
    return hidden @ p[f"{name}linear_fc2.weight"].T


def hybrid_model(tokens, p, config, pattern, heads, groups, top, segments=None):
    """As `model`, of the layers that a pattern has."""
    x = last_hidden_states(tokens, p, config, pattern, heads, groups, top, segments)
    return (x @ p["output_layer.weight"].T).transpose(0, 1)


def last_hidden_states(tokens, p, config, pattern, heads, groups, top, segments=None):
    """What the output of `hybrid_model` is made of, [length, batch, width]."""
    x = p["embedding.word_embeddings.weight"][tokens.T]
    for index, symbol in enumerate(pattern):
        prefix = f"decoder.layers.{index}."
        layer = {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}
        if symbol == "M":
            x = block(x, layer, config, segments, top)
        elif symbol == "*":
            x = attention(x, layer, config, segments, heads, groups)
        else:
            x = mlp(x, layer, config) if symbol == "-" else experts(x, layer, config, top)
    return timestep_norm(x, p, "decoder.final_layernorm", config, segments)


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


def further_predictions(tokens, hidden_states, p, config, depths, segments=None):
    """Logits of `depths` layers that each predict one token further than the last.

    hidden_states [length, batch, width] are those that the model's output is made of.
    """
    segments, found = segments or Segments.of_rows(*tokens.T.shape), []
    for depth in range(depths):
        prefix = f"mtp.layers.{depth}."
        layer = {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}
        tokens = one_later(tokens, segments)
        embedded = p["embedding.word_embeddings.weight"][tokens.T]
        both = [
            rms_norm_naive(x, layer[f"{name}.weight"], config.norm_eps)
            for name, x in (("enorm", embedded), ("hnorm", hidden_states))
        ]
        x = torch.cat(both, -1) @ layer["eh_proj.weight"].T
        own = "mtp_model_layer.layers.0."
        block_of = {n.removeprefix(own): v for n, v in layer.items() if n.startswith(own)}
        x = block(x, block_of, config, segments)
        hidden_states = rms_norm_naive(x, layer["final_layernorm.weight"], config.norm_eps)
        found.append((hidden_states @ p["output_layer.weight"].T).transpose(0, 1))
    return found


def one_later(values, segments):
    """Of each step [batch, length] what the next one of its document has, or zero."""
    found = torch.zeros_like(values)
    for row, start, length, _ in segments:
        found[row, start : start + length - 1] = values[row, start + 1 : start + length]
    return found
