"""Run as a program on every rank: tensors go into a model of mixed layers and come out again.

python -m megalodon_mcore.cpu mixed_layers.py PATTERN TP PP EP IMPLEMENTATION
"""

import sys
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.utils import unwrap_model

from megalodon_mcore.bridge import MegalodonBridge, MegalodonHybridProvider, MegalodonModelProvider
from megalodon_mcore.config import BLOCKS, MegalodonConfig
from megalodon_mcore.parameters import parameters
from megalodon_mcore.pretraining import stand_alone_environment

BOTH = {
    "hidden_size": 64,
    "num_heads": 2,
    "ffn_hidden_size": 96,
    "chunk_size": 16,
    "swiglu": True,
    "vocab_size": 128,
    "attention_heads": 4,
    "attention_groups": 2,
    "attention_head_dim": 8,
    "attention_positions": "rope",
    "qkv_bias": True,
    "num_experts": 4,
    "expert_ffn_size": 32,
    "shared_expert_size": 48,
    "shared_expert_gate": True,
    "router_score": "sigmoid",
    "router_bias": True,
}


class Tensors(dict):
    """A Hugging Face model's tensors, as Bridge asks for them."""

    @property
    def source(self):
        return SimpleNamespace(get_all_keys=self.keys)


def hf_model(config):
    """A configuration and random tensors of a model in Hugging Face's names."""
    random = torch.Generator().manual_seed(0)
    tensors = {z.hf: torch.randn(z.shape, generator=random) for z in parameters(config)}
    names = SimpleNamespace(**config.named("hf"), torch_dtype=torch.float32)
    return SimpleNamespace(config=names, state=Tensors(tensors), model_name_or_path="random")


def main(pattern, tp, pp, ep, implementation):
    stand_alone_environment()
    symbols = pattern.replace("|", "")
    config = MegalodonConfig(num_layers=len(symbols), layers=symbols, **BOTH)
    hf = hf_model(config)
    bridge = MegalodonBridge()
    bridge.hf_config = hf.config

    provider = bridge.provider_bridge(hf)
    is_hybrid = bool(set(symbols) - set(BLOCKS))
    assert isinstance(provider, MegalodonHybridProvider) == is_hybrid
    assert provider.config() == config
    assert MegalodonBridge.megatron_to_hf_config(provider).items() > config.named("hf").items()
    if is_hybrid:
        provider.hybrid_layer_pattern = pattern.replace("X", "M")
    provider.transformer_impl = implementation
    provider.moe_grouped_gemm = implementation == "transformer_engine"
    provider.tensor_model_parallel_size = int(tp)
    provider.sequence_parallel = int(tp) > 1
    provider.pipeline_model_parallel_size = int(pp)
    provider.expert_model_parallel_size = int(ep)
    provider.finalize()
    assert provider.config() == config
    provider.initialize_model_parallel(seed=0)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, bf16=False, fp16=False)
    assert isinstance(unwrap_model(chunks)[0], HybridModel if is_hybrid else GPTModel)
    for tensor in unwrap_model(chunks)[0].state_dict().values():
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            tensor.fill_(float("nan"))

    bridge.load_weights_hf_to_megatron(hf, chunks)
    check_shares(unwrap_model(chunks)[0], hf.state, config)
    out = dict(bridge.stream_weights_megatron_to_hf(chunks, hf, show_progress=False))
    assert out.keys() == hf.state.keys(), out.keys() ^ hf.state.keys()
    for name, tensor in out.items():
        assert torch.equal(tensor, hf.state[name]), name


def check_shares(model, hf, config):
    """Compares what this rank has of Megatron's own layers with parts cut by hand."""
    share = sharer(parallel_state.get_tensor_model_parallel_group())
    for layer in model.decoder.layers:
        name = f"model.layers.{layer.layer_number - 1}."
        symbol = config.symbols[layer.layer_number - 1]
        if symbol == "*":
            own = layer.self_attention
            assert torch.equal(layer.input_layernorm.weight, hf[name + "norm.weight"])
            for end in ("weight", "bias"):
                qkv = hf[f"{name}attention.qkv.{end}"]
                assert torch.equal(getattr(own.linear_qkv, end), share(qkv, 0))
            assert torch.equal(own.linear_proj.weight, share(hf[name + "attention.proj.weight"], 1))
        if symbol == "-":
            check_mlp(layer.mlp, [hf[f"{name}ffn.{w}.weight"] for w in ("w1", "w3", "w2")], share)
        if symbol == "E":
            check_experts(layer.mlp, name, hf, share)
        if symbol == "X":
            check_experts(layer.feed_forward.experts, name, hf, share)


def sharer(group):
    """What gives this rank's part of a tensor that a group shares along an axis."""
    return lambda tensor, axis: tensor.chunk(group.size(), dim=axis)[group.rank()]


def check_mlp(mlp, weights, share):
    w1, w3, w2 = weights
    assert torch.equal(mlp.linear_fc1.weight, torch.cat([share(w1, 0), share(w3, 0)]))
    assert torch.equal(mlp.linear_fc2.weight, share(w2, 1))


def check_experts(layer, name, hf, share):
    assert torch.equal(layer.router.weight, hf[name + "experts.router.weight"])
    assert torch.equal(layer.router.expert_bias, hf[name + "experts.router_bias"])
    shared = [hf[f"{name}shared_expert.{w}.weight"] for w in ("w1", "w3", "w2")]
    check_mlp(layer.shared_experts, shared, share)
    assert torch.equal(layer.shared_experts.gate_weight, hf[name + "shared_expert.gate.weight"])
    share = sharer(parallel_state.get_expert_tensor_parallel_group())
    for local, number in enumerate(layer.local_expert_indices):
        weights = [hf[f"{name}experts.{w}"][number] for w in ("w1", "w3", "w2")]
        if hasattr(layer.experts, "local_experts"):
            check_mlp(layer.experts.local_experts[local], weights, share)
        else:
            linears = (layer.experts.linear_fc1, layer.experts.linear_fc2)
            fc1, fc2 = (SimpleNamespace(weight=getattr(z, f"weight{local}")) for z in linears)
            check_mlp(SimpleNamespace(linear_fc1=fc1, linear_fc2=fc2), weights, share)


if __name__ == "__main__":
    assert type(MegalodonModelProvider.of("200m")) is MegalodonModelProvider
    main(*sys.argv[1:])
