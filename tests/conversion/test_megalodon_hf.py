"""Import of pszemraj/megalodon-hf's folders: how its parameters lie and what it cannot say."""

import json
import os
import sys

import pytest
import torch
from conversion_samples import assert_same_tensors, build, convert, hf_tensors
from safetensors.torch import save_file

from comparing import error

SHAPE = "swiglu-two-heads-rescale"
PORT = os.environ.get("MEGALODON_HF_PATH")


def port_configuration(config):
    return dict(
        model_type="megalodon",
        vocab_size=config.vocab_size,
        model_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        z_dim=config.z_dim,
        value_dim=config.value_dim,
        ffn_hidden_dim=config.intermediate_size,
        cema_ndim=config.cema_ndim,
        chunk_size=config.chunk_size,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        rope_base=config.rope_theta,
        swiglu=config.swiglu,
        rescale_nffn=config.rescale_nffn,
        scale_emb=config.scale_embedding,
    )


def port_tensors(model):
    """A model's parameters as the port has them, element by element."""
    config, tensors = model.config, {}
    width = config.z_dim // config.num_attention_heads
    rows = [
        head * width + 2 * (j % (width // 2)) + j // (width // 2)
        for head in range(config.num_attention_heads)
        for j in range(width)
    ]
    renamed = {"timestep_norm.": "timenorm.", "cema_norm.weight": "rmsnorm.gamma"}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            tensors[name.replace("embed_tokens", "embed")] = tensor
            continue
        layer, _, own = name.removeprefix("model.layers.").partition(".")
        attention, ffn = f"model.layers.{layer}.attn.", f"model.layers.{layer}.ffn."
        tensors[f"{attention}wh2.bias"] = torch.zeros(config.hidden_size)
        if own.startswith("wz."):
            tensors[attention + own] = tensor[rows]
        elif own.startswith("query_key."):
            tensors[attention + ("gamma" if "weight" in own else "beta")] = tensor[:, rows]
        elif own == "cema.gamma":
            tensors[f"{attention}cema.gamma_real"] = tensor[..., 0]
            tensors[f"{attention}cema.gamma_imag"] = tensor[..., 1]
        elif own == "cema.omega":
            tensors[attention + own] = tensor[:, 0]
        elif own.startswith("ffn_norm."):
            tensors[f"{ffn}norm.{own[9:]}"] = tensor + 1 if "weight" in own else tensor
        elif own.startswith("ffn.w"):
            tensors[f"{ffn}fc{own[5]}.weight"] = tensor
            tensors[f"{ffn}fc{own[5]}.bias"] = torch.zeros(len(tensor))
        elif own != "ffn.rescale.weight":
            for ours, theirs in renamed.items():
                own = own.replace(ours, theirs)
            tensors[attention + own] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


@pytest.fixture
def model():
    model = build(SHAPE)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.ffn.rescale.weight.fill_(0.1 * 0.5**index)
            # The offset of a scale that float32 has, so that nothing is lost on the way.
            layer.ffn_norm.weight.copy_((layer.ffn_norm.weight + 1) - 1)
    return model


def write_port(folder, model, **changes):
    folder.mkdir()
    save_file(port_tensors(model) | changes, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(port_configuration(model.config)))
    return folder


def test_the_same_parameters(model, tmp_path, capsys):
    port = write_port(tmp_path / "port", model)
    assert convert("megalodon-hf", "hf", port, tmp_path / "hf") == 0
    assert "TimestepNorm" in capsys.readouterr().err
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert_same_tensors(hf_tensors(tmp_path / "hf"), expected)
    assert convert("megalodon-hf", "mcore", port, tmp_path / "mcore") == 0
    assert convert("mcore", "hf", tmp_path / "mcore", tmp_path / "again") == 0
    assert_same_tensors(hf_tensors(tmp_path / "again"), expected)


def test_biases(model, tmp_path, capsys):
    bias = torch.arange(32) / 32
    port = write_port(tmp_path / "a", model, **{"model.layers.1.attn.wh2.bias": bias})
    assert convert("megalodon-hf", "hf", port, tmp_path / "hf") == 0
    expected = model.model.layers[1].wh1.bias.detach() + bias
    assert torch.equal(hf_tensors(tmp_path / "hf")["model.layers.1.wh1.bias"], expected)

    port = write_port(tmp_path / "b", model, **{"model.layers.1.ffn.fc2.bias": bias})
    assert convert("megalodon-hf", "hf", port, tmp_path / "c") == 2
    assert "model.layers.1.ffn.fc2.bias" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(PORT is None, reason="MEGALODON_HF_PATH names no checkout of megalodon-hf")
def test_the_ports_own_model_but_for_its_timestep_norm(model, tmp_path, monkeypatch):
    """The port with Megalodon's TimestepNorm put in computes what the import computes."""
    monkeypatch.syspath_prepend(f"{PORT}/src")
    sys.modules.pop("megalodon", None)
    from megalodon import modeling_megalodon
    from megalodon.configuration_megalodon import MegalodonConfig

    def timestep_norm(self, x, *ignored):
        batch, length, width = x.shape
        groups = x.double().view(batch, length, self.num_groups, -1)
        count = torch.arange(1, length + 1).view(1, -1, 1)
        mean = groups.mean(-1).cumsum(1) / count
        var = groups.square().mean(-1).cumsum(1) / count - mean.square()
        y = (groups - mean[..., None]) / (var[..., None] + self.eps).sqrt()
        y = y.view(x.shape).to(x.dtype) * (self.weight + 1) + self.bias
        return y, torch.full((batch,), length), mean[:, -1], var[:, -1]

    monkeypatch.setattr(modeling_megalodon.TimestepNorm, "forward", timestep_norm)
    config = port_configuration(model.config)
    del config["model_type"]
    port = modeling_megalodon.MegalodonForCausalLM(MegalodonConfig(**config)).eval()
    port.lm_head.weight = torch.nn.Parameter(port.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in port.named_parameters():
            if not (".fc" in name and name.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    port.save_pretrained(tmp_path / "port")
    assert convert("megalodon-hf", "hf", tmp_path / "port", tmp_path / "hf") == 0
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = torch.randint(61, (2, 48))
    with torch.no_grad():
        expected = port(tokens, use_cache=False).logits
        assert error(ours(tokens).logits, expected) < 1e-5
