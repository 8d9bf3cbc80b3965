"""Reads checkpoints of pszemraj/megalodon-hf, the community's Hugging Face port.

It differs from the released code in what its parameters mean:
- RoPE rotates the halves of a head, (j, j + width/2), where ours rotates (2j, 2j + 1): the rows of
  Wz and what scales and shifts them per head are permuted.
- its LayerNorm has a weight that is the scale, not the scale's offset from one.
- Wh2 has a bias, which is added to Wh1's; those of the FFN have no place in Megalodon.
- `rescale_nffn` is a constant, not a parameter.
- whether the output is tied depends on transformers' version; the weights tell.
- its TimestepNorm divides by another deviation: that of each step's group mean over time, begun
  with a variance of one. No parameter can make up for it, so the weights come over exactly and the
  function does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_mcore.config import MegalodonConfig, config_from
from megalodon_mcore.conversion.json_file import read_object
from megalodon_mcore.conversion.model import OpenModel, Tokenizer
from megalodon_mcore.conversion.tensor_folder import TensorFolder
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER, open_tokenizer
from megalodon_mcore.parameters import Parameter, parameters

PORT_DIFFERS = (
    "megalodon-hf's TimestepNorm takes the variance of group means over time, Megalodon's that of "
    "all values; the weights are the same, the model's outputs are not. Train it on before use."
)
"""The warning to whoever converts a model of the port."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "model_dim": 1024,
    "num_layers": 12,
    "num_heads": 1,
    "z_dim": 256,
    "value_dim": 2048,
    "ffn_hidden_dim": 2560,
    "cema_ndim": 16,
    "chunk_size": 2048,
    "norm_num_groups": 32,
}
"""The port's own; a saved configuration may leave out what equals them."""

NAMES = {
    "model.embed_tokens.weight": "model.embed.weight",
    "timestep_norm": "attn.timenorm",
    "cema_norm.weight": "attn.rmsnorm.gamma",
    "query_key.weight": "attn.gamma",
    "query_key.bias": "attn.beta",
    "ffn_norm": "ffn.norm",
    "ffn.w1": "ffn.fc1",
    "ffn.w2": "ffn.fc2",
    "ffn.w3": "ffn.fc3",
}
"""The port's names by ours, where a prefix `attn.` is not all; see _name."""

WITH_HALVES = ("wz.weight", "wz.bias", "query_key.weight", "query_key.bias")
NORMS = ("timestep_norm.", "cema_norm.", "ffn_norm.")


def open_megalodon_hf(folder: Path) -> OpenModel:
    """Opens a folder that the port's save_pretrained wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is not what config.json says, or has what no Megalodon has.
    """
    origin = str(folder / "config.json")
    given = read_object(folder / "config.json")
    if given.get("model_type") != "megalodon" or "hidden_size" in given:
        raise ValueError(f"{origin} is not that of pszemraj's port.")
    values = DEFAULTS | given
    if values.get("output_size", -1) not in (-1, None, values["vocab_size"]):
        raise ValueError(f"{origin} has an output_size other than vocab_size.")
    tensors = TensorFolder(folder)
    values["share_emb"] = "lm_head.weight" not in tensors.names() or torch.equal(
        tensors.read("lm_head.weight"), tensors.read("model.embed.weight")
    )
    config = config_from(values, "released", origin)
    _check_names(tensors, config, folder)
    dtype = tensors.read("model.embed.weight").dtype
    named = {torch.bfloat16, torch.float16}
    tokenizer = open_tokenizer(folder)
    if tokenizer is None and isinstance(values.get("eos_token_id"), int):
        tokenizer = Tokenizer(NULL_TOKENIZER, (), values["eos_token_id"])
    return OpenModel(
        folder,
        config,
        dtype if dtype in named else torch.float32,
        lambda parameter: _fetch(tensors, parameter, config, values),
        tokenizer,
    )


def adjacent_from_halves(tensor: Tensor, axis: int, heads: int) -> Tensor:
    """Moves elements j and j + width/2 of each head, along the axis, to places 2j and 2j + 1."""
    tensor = tensor.movedim(axis, 0)
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).movedim(0, axis).contiguous()


def _name(parameter: Parameter) -> str:
    """The port's name of what has a parameter, for all but CEMA's gamma."""
    prefix, own = "", parameter.hf
    if parameter.layer is not None:
        prefix, own = f"model.layers.{parameter.layer}.", parameter.row.hf
    for ours, theirs in NAMES.items():
        if own == ours or own.startswith(f"{ours}."):
            return prefix + theirs + own.removeprefix(ours)
    return f"{prefix}attn.{own}" if prefix else own


def _fetch(
    tensors: TensorFolder,
    parameter: Parameter,
    config: MegalodonConfig,
    values: dict[str, Any],
) -> Tensor:
    own, name = parameter.row.hf, _name(parameter)
    if own == "ffn.rescale.weight":
        return torch.full(parameter.shape, 0.1 * 0.5**parameter.layer)
    if own == "cema.gamma":
        parts = [tensors.read(f"{name}_{part}").float() for part in ("real", "imag")]
        return torch.stack(parts, dim=-1)
    if values.get("norm_affine") is False and own.startswith(NORMS) and name not in tensors.names():
        return torch.zeros(parameter.shape)
    tensor = tensors.read(name)
    if own == "cema.omega":
        return tensor.unsqueeze(-1)
    if own == "ffn_norm.weight":
        return tensor.float() - 1.0
    if own == "wh1.bias":
        other = tensors.read(name.replace("wh1", "wh2"))
        return (tensor.float() + other.float()).to(tensor.dtype)
    if own in WITH_HALVES and tuple(tensor.shape) == parameter.shape:
        axis = 1 if own.startswith("query_key") else 0
        return adjacent_from_halves(tensor, axis, config.num_heads)
    return tensor


def _check_names(tensors: TensorFolder, config: MegalodonConfig, folder: Path) -> None:
    known = {"lm_head.weight"}
    for parameter in parameters(config):
        name = _name(parameter)
        if parameter.row.hf == "cema.gamma":
            known |= {f"{name}_real", f"{name}_imag"}
        else:
            known.add(name)
    for layer in range(config.num_layers):
        known.add(f"model.layers.{layer}.attn.wh2.bias")
        for linear in ("fc1", "fc2", "fc3") if config.swiglu else ("fc1", "fc2"):
            name = f"model.layers.{layer}.ffn.{linear}.bias"
            known.add(name)
            if name in tensors.names() and tensors.read(name).count_nonzero():
                raise ValueError(
                    f"{name} in {folder} is not zero; Megalodon's feed-forward network has no "
                    "biases, so this model cannot be one exactly."
                )
    extra = tensors.names() - known
    if extra:
        raise ValueError(f"{folder} has {min(extra)}, of which its config.json knows nothing.")
