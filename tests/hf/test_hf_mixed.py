"""What models of several kinds of layers compute, against Megatron's own layers and float64."""

import dataclasses

import pytest
import torch
from mixed_models import build_mixed
from torch.nn.functional import layer_norm, silu

from building import build_hybrid, randomize
from comparing import error
from megalodon_mcore.conversion.hf_model import hf_model
from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.hf import MegalodonConfig

TOLERANCE = 1e-5
ROUTER = dict(moe_router_load_balancing_type="none", moe_ffn_hidden_size=20)
SIGMOID = ROUTER | dict(
    num_moe_experts=5,
    moe_router_topk=3,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_shared_expert_intermediate_size=12,
)
GROUPS = dict(heads=4, num_query_groups=2, kv_channels=6, positions="rope")
# Megatron's options of the layers, and what the description of the model calls them.
ATTENTION = dict(attention_heads=4, attention_groups=2, attention_head_dim=6)
CASES = {
    "M*ME": (
        GROUPS | SIGMOID | dict(rotary_percent=0.7),
        ATTENTION
        | dict(attention_positions="rope", rotary_percent=0.7, num_experts=5, experts_per_token=3)
        | dict(expert_ffn_size=20, shared_expert_size=12, router_score="sigmoid")
        | dict(router_bias=True, router_scaling=2.5),
    ),
    "*M-M": (
        dict(heads=2, normalization="LayerNorm", add_bias_linear=True, add_qkv_bias=True),
        dict(attention_heads=2, linear_bias=True, normalization="LayerNorm"),
    ),
    "ME*": (
        GROUPS
        | ROUTER
        | dict(num_moe_experts=4, moe_router_topk=1, moe_router_pre_softmax=True)
        | dict(moe_shared_expert_intermediate_size=12, moe_shared_expert_gate=True),
        ATTENTION
        | dict(attention_positions="rope", num_experts=4, experts_per_token=1, expert_ffn_size=20)
        | dict(router_pre_softmax=True, shared_expert_size=12, shared_expert_gate=True),
    ),
    "M*M": (
        GROUPS | SIGMOID | dict(moe_layer_freq=2),
        dict(layers="X*M", attention_positions="rope", num_experts=5, experts_per_token=3)
        | dict(expert_ffn_size=20, shared_expert_size=12, router_score="sigmoid")
        | dict(router_bias=True, router_scaling=2.5)
        | ATTENTION,
    ),
    "MM/M": (
        ROUTER | dict(num_moe_experts=4),
        dict(layers="XX", num_experts=4, expert_ffn_size=20),
    ),
    "M-E": (
        ROUTER | dict(num_moe_experts=4, moe_router_topk=2, normalization="LayerNorm"),
        dict(num_experts=4, expert_ffn_size=20, normalization="LayerNorm"),
    ),
}


def exported(model, config):
    """The Hugging Face model with a Megatron model's parameters."""
    state = model.state_dict()

    def fetch(parameter):
        part, name = parameter.row.part, parameter.mcore
        if ".experts.experts." in name:
            own = name.replace("experts.experts.linear", "experts.local_experts.{}.linear")
            tensor = torch.stack([state[own.format(e)] for e in range(config.num_experts)])
        else:
            tensor = state[name]
        if part is None:
            return tensor
        halves = tensor.shape[part.axis] // 2
        sizes = [config.hidden_size, config.value_dim] if part.apart else halves
        return tensor.split(sizes, part.axis)[part.index]

    return hf_model(OpenModel("the model", config, torch.float32, fetch))


@pytest.mark.parametrize("pattern", CASES)
def test_logits_are_those_of_megatrons_layers(megatron, pattern):
    options, values = CASES[pattern]
    model, blocks = build_hybrid(pattern, own=dict(chunk_size=16), **options)
    randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.normal_(buffer)
    values = {"layers": pattern, "normalization": "RMSNorm"} | values
    config = dataclasses.replace(blocks, **values)
    tokens = torch.randint(64, (2, 53))
    with torch.no_grad():
        expected = model.eval()(tokens, None, None).double()
        assert error(exported(model, config)(tokens).logits, expected) < TOLERANCE


def mixture_naive(u, layer, config):
    """Of one token [D]: the chosen experts one by one, and the shared one."""
    p = {name: z.double() for name, z in layer.named_parameters()}
    scores = p["experts.router.weight"] @ u
    if config.router_score == "sigmoid":
        scores = scores.sigmoid()
        bias = p.get("experts.router_bias", torch.zeros_like(scores))
        chosen = sorted(range(len(scores)), key=lambda e: -(scores + bias)[e])
        chosen = chosen[: config.num_experts_per_tok]
        weights = scores[chosen] / (scores[chosen].sum() if len(chosen) > 1 else 1)
    else:
        chosen = scores.argsort(descending=True)[: config.num_experts_per_tok].tolist()
        weights = (scores.softmax(0) if config.router_pre_softmax else scores)[chosen]
        weights = weights if config.router_pre_softmax else weights.softmax(0)
    output = torch.zeros_like(u)
    for weight, e in zip(weights * config.router_scaling, chosen, strict=True):
        w1, w3, w2 = (p[f"experts.{w}"][e] for w in ("w1", "w3", "w2"))
        output += weight * (w2 @ (silu(w1 @ u) * (w3 @ u)))
    if config.shared_expert_intermediate_size:
        w1, w3, w2 = (p[f"shared_expert.{w}.weight"] for w in ("w1", "w3", "w2"))
        shared = w2 @ (silu(w1 @ u) * (w3 @ u))
        if config.shared_expert_gate:
            shared = shared * (p["shared_expert.gate.weight"] @ u).sigmoid()
        output = output + shared
    return output


ROUTERS = {
    "softmax of the best": dict(),
    "the best of a softmax": dict(router_pre_softmax=True, router_scaling=1.5),
    "one": dict(num_experts_per_tok=1, router_score="sigmoid", router_scaling=0.5),
    "biased": dict(
        router_score="sigmoid",
        router_bias=True,
        shared_expert_intermediate_size=12,
        shared_expert_gate=True,
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_block_with_experts_follows_its_equations(name):
    """y = x + mixer(x), out = x + rescale(experts(LayerNorm(y))): all but the mixer in float64."""
    model = build_mixed("MX*", **ROUTERS[name])
    config, layer = model.config, model.model.layers[1]
    middles = []
    layer.ffn_norm.register_forward_hook(lambda module, given, made: middles.append(given[0]))
    with torch.no_grad():
        states = model(torch.randint(64, (2, 19)), output_hidden_states=True).hidden_states
        x, actual = states[1].double(), states[2]
        norm = (z.double() for z in (layer.ffn_norm.weight + 1, layer.ffn_norm.bias))
        u = layer_norm(middles[0].double(), (32,), *norm, config.norm_eps)
        mixed = torch.stack([mixture_naive(z, layer, config) for z in u.flatten(0, 1)])
        expected = x + mixed.view_as(x) * layer.ffn.rescale.weight.double()
    assert error(actual, expected) < TOLERANCE


def test_a_bias_chooses_experts_and_weights_none():
    model = build_mixed("M*ME")
    experts = model.model.layers[3].experts
    u = torch.randn(1, 40, 32)
    with torch.no_grad():
        experts.router_bias.zero_()
        before, chosen = experts.route(u[0])
        experts.router_bias.add_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
        after, favoured = experts.route(u[0])
    assert set(favoured.flatten().tolist()) == {0, 1}
    same = (chosen.sort().values == favoured.sort().values).all(1)
    assert torch.allclose(before[same].sort().values, after[same].sort().values) and same.any()


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero():
    model = build_mixed("M*ME")
    experts = model.model.layers[3].experts
    with torch.no_grad():
        experts.router_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    tokens = torch.randint(64, (2, 11))
    model(tokens, labels=tokens).loss.backward()
    assert experts.w1.grad[:2].abs().amax((1, 2)).min() > 0 and not experts.w1.grad[2:].any()
    assert experts.router_bias.grad is None


HOSTILE = {
    "layer_symbols has 'Q'; it takes M (a block), X": dict(layer_symbols="MQ"),
    "layer_symbols has 3 symbols and num_hidden_layers is 2": dict(layer_symbols="M*M"),
    "layer_symbols has 1 symbols and": dict(layer_symbols="M"),
    "layer_symbols has 0 symbols and": dict(layer_symbols=""),
    "normalization is 'Norm'; it takes LayerNorm or RMSNorm": dict(normalization="Norm"),
    "num_experts is 4, but layer_symbols has none of E, X": dict(num_experts=4),
    "attention_positions is 'alibi'; it takes none or rope": dict(attention_positions="alibi"),
    "attention_heads is 0; it takes a positive integer": dict(attention_heads=0),
    "num_key_value_heads is 3; it takes a divisor of attention_heads, which is 4": dict(
        attention_heads=4, num_key_value_heads=3
    ),
    "head_dim is 5; rope rotates pairs": dict(head_dim=5, attention_positions="rope"),
    "head_dim is 2147483648; it takes less than 2**31": dict(head_dim=2**31),
    "partial_rotary_factor is 1.5; it takes 1 or less": dict(partial_rotary_factor=1.5),
    "partial_rotary_factor is 0.0; it takes a positive": dict(partial_rotary_factor=0.0),
    "num_experts is None; it takes a positive integer": dict(layer_symbols="ME"),
    "num_experts_per_tok is 3; num_experts is 2": dict(
        layer_symbols="MX", num_experts=2, num_experts_per_tok=3
    ),
    "swiglu is False; layers -, E and X are gated": dict(layer_symbols="M-", swiglu=False),
    "router_bias is True, which goes with router_score sigmoid": dict(
        layer_symbols="ME", num_experts=4, router_bias=True
    ),
    "router_scaling is 0.0; it takes a positive number": dict(
        layer_symbols="ME", num_experts=4, router_scaling=0.0
    ),
    "shared_expert_gate is True, but there is no shared expert": dict(
        layer_symbols="ME", num_experts=4, shared_expert_gate=True
    ),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_values_that_do_not_fit_are_refused_in_a_sentence(words):
    values = dict(layer_symbols="M*", swiglu=True) | HOSTILE[words]
    with pytest.raises(ValueError, match=".") as refused:
        MegalodonConfig(num_hidden_layers=2, hidden_size=32, **values)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_blocks_alone_say_nothing_of_other_layers(tmp_path):
    config = MegalodonConfig(num_hidden_layers=2, hidden_size=32, layer_symbols="MM")
    assert config.layer_symbols is None and config.symbols == "MM"
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for name in ("layer_symbols", "expert", "router", "attention_heads", "head_dim", "linear_bias"):
        assert name not in text.replace("num_attention_heads", "")
