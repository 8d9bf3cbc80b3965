"""Any checkpoint as a causal language model of transformers, with its tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.conversion.json_file import read_object
from megalodon_mcore.conversion.model import Tokenizer
from megalodon_mcore.opened_checkpoint import (
    open_checkpoint,
    refuse_iteration,
    refuse_other_configuration,
    require_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalModel(NamedTuple):
    """A model to be scored.

    streams says whether it reads a text piece by piece, its memory in a MegalodonCache; others read
    whole windows. context is the most tokens that it reads at once, None where there is no bound.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    folder: Path
    vocab_size: int
    streams: bool
    context: int | None

    @property
    def identity(self) -> dict[str, object]:
        """What a result depends on: kind, type, device, and the files by size and time."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        stats = [(file.name, file.stat()) for file in (*files, *self.tokenizer.files)]
        listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return {
            "checkpoint": str(self.folder.absolute()),
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "sizes and times of files": hashlib.sha256(repr(listed).encode()).hexdigest(),
        }


def load_model(folder: Path, iteration: int | None, tokenizer: Path | None) -> CausalModel:
    """Loads a checkpoint onto the GPU or, where there is none, the CPU.

    Args:
        folder: Megatron's, released or any causal model's folder that transformers knows.
        iteration: which of training's checkpoints; the last one by default.
        tokenizer: place of the tokenizer, if not the checkpoint's own.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, predicts from what follows, or has no tokenizer.
    """
    from megalodon_mcore.conversion.hf_model import hf_model

    refuse_other_configuration()
    if not folder.is_dir():
        raise FileNotFoundError(f"--checkpoint is {folder}, which is no folder.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if _is_another_kind(folder):
        refuse_iteration(iteration, folder)
        return _load_other(folder, tokenizer, device)
    opened = open_checkpoint(folder, iteration, tokenizer)
    own = require_tokenizer(opened.tokenizer, folder)
    return CausalModel(
        hf_model(opened, device), own, opened.folder, opened.config.vocab_size, True, None
    )


def _is_another_kind(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or (folder / "consolidate_config.json").is_file():
        return False
    return read_object(folder / "config.json").get("model_type") != "megalodon"


def _load_other(folder: Path, tokenizer: Path | None, device: str) -> CausalModel:
    from transformers import AutoModelForCausalLM

    from megalodon_mcore.conversion.tokenizers import open_tokenizer

    own = require_tokenizer(open_tokenizer(tokenizer or folder), tokenizer or folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype="auto",
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(
            f"--checkpoint is {folder}, of which transformers loads no causal language model: "
            f"{first_line(error)}."
        ) from None
    # transformers gives them random values and a warning.
    if found["missing_keys"]:
        raise ValueError(
            f"--checkpoint is {folder}, which lacks {min(found['missing_keys'])}; give a folder "
            "with all of the model's weights."
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} in {folder} has NaN or infinite values.")
    model = model.to(device).eval()
    config = model.config.get_text_config()
    if not _is_causal(model, config.vocab_size):
        raise ValueError(
            f"--checkpoint is {folder}, whose {type(model).__name__} predicts a token from those "
            "that follow; give a causal language model."
        )
    context = getattr(config, "max_position_embeddings", None)
    return CausalModel(model, own, folder, config.vocab_size, False, context)


def _is_causal(model: PreTrainedModel, vocab_size: int) -> bool:
    """Whether another last token leaves the logits before it as they are, but for rounding.

    Tensors of the same shapes are computed alike; experts alone see their tokens otherwise grouped.
    """
    tokens = torch.arange(4, device=model.device)[None] % vocab_size
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    with torch.no_grad():
        one, two = (model(z, use_cache=False).logits[:, :-1].float() for z in (tokens, other))
    bound = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    return bool((one - two).abs().max() <= bound * one.abs().max())
