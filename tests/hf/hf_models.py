"""Small Hugging Face models for tests, and their parameters by straight_line's names."""

import torch

from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM

SHAPES = {
    "one-head": dict(chunk_size=16),
    "swiglu-heads-rescale": dict(
        num_attention_heads=2,
        chunk_size=8,
        z_dim=8,
        value_dim=24,
        cema_ndim=3,
        norm_num_groups=4,
        swiglu=True,
        rescale_nffn=True,
    ),
    "tied-scaled-four-heads": dict(
        num_attention_heads=4,
        chunk_size=13,
        z_dim=16,
        norm_num_groups=32,
        scale_embedding=True,
        tie_word_embeddings=True,
        rope_theta=100_000.0,
    ),
}
LAYERS = 2


def build(name="swiglu-heads-rescale", **changes):
    """A model of one of SHAPES."""
    return random_model(**(SHAPES[name] | changes))


def random_model(**values):
    """A model in evaluation mode whose every parameter is off its (often zero) start."""
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=48)
    torch.manual_seed(0)
    model = MegalodonForCausalLM(MegalodonConfig(**(sizes | values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def straight_line_parameters(parameters):
    """Renames, and joins what Megatron's layers hold as one; differentiable."""
    renamed = {
        "embedding.word_embeddings.weight": parameters["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": parameters["model.norm.weight"],
        "decoder.final_layernorm.bias": parameters["model.norm.bias"],
    }
    if "lm_head.weight" in parameters:
        renamed["output_layer.weight"] = parameters["lm_head.weight"]
    names = {"wz": "linear_z", "wv": "linear_v", "wr": "linear_r"}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        own = {n.removeprefix(prefix): p for n, p in parameters.items() if n.startswith(prefix)}
        joined = {
            "mixer.linear_proj.weight": torch.cat(
                [own.pop("wh1.weight"), own.pop("wh2.weight")], 1
            ),
            "mixer.linear_proj.bias": own.pop("wh1.bias"),
            "feed_forward.linear_fc2.weight": own.pop("ffn.w2.weight"),
        }
        first = [own.pop(n) for n in ("ffn.w1.weight", "ffn.w3.weight") if n in own]
        joined["feed_forward.linear_fc1.weight"] = torch.cat(first)
        for name, value in own.items():
            module, _, rest = name.partition(".")
            if module == "ffn_norm":
                joined[f"feed_forward.norm.{rest}"] = value
            elif module == "ffn":
                joined[f"feed_forward.{rest}"] = value
            else:
                joined[f"mixer.{names.get(module, module)}.{rest}"] = value
        renamed |= {f"decoder.layers.{index}.{name}": value for name, value in joined.items()}
    return renamed
