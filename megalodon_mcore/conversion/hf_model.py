"""The Hugging Face model of a checkpoint of any format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megalodon_mcore.conversion.hf_folder import piece_length
from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.parameters import parameters

if TYPE_CHECKING:
    from megalodon_mcore.hf import MegalodonForCausalLM


def hf_model(model: OpenModel, device: torch.device | str = "cpu") -> MegalodonForCausalLM:
    """Builds it in evaluation mode; beside it there is never more than one tensor.

    Args:
        model: the checkpoint, whose types it has.
        device: where it goes.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM

    values = model.config.named("hf")
    values["rope_theta"] = float(values["rope_theta"])
    own = MegalodonConfig(**values, piece_length=piece_length(model.config.chunk_size))
    with torch.device("meta"):
        built = MegalodonForCausalLM(own)
    for parameter in parameters(model.config):
        owner, _, name = parameter.hf.rpartition(".")
        tensor = nn.Parameter(model.read(parameter).to(device), requires_grad=False)
        setattr(built.get_submodule(owner), name, tensor)
    if model.config.tied:
        built.lm_head.weight = built.model.embed_tokens.weight
    return built.eval()
