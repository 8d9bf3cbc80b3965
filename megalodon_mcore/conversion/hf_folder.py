"""Folders of the stand-alone Hugging Face model, `megalodon_mcore/hf`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import megalodon_mcore
from megalodon_mcore.config import KINDS, config_from, names
from megalodon_mcore.conversion.json_file import read_object, write_object
from megalodon_mcore.conversion.model import OpenModel, Tokenizer
from megalodon_mcore.conversion.model_card import model_card
from megalodon_mcore.conversion.safetensors_file import Entry
from megalodon_mcore.conversion.tensor_folder import TensorFolder, write_tensor_folder
from megalodon_mcore.conversion.tokenizers import (
    NULL_TOKENIZER,
    copy_tokenizer,
    open_tokenizer,
    pad_on_the_left,
)
from megalodon_mcore.parameters import Parameter, parameters

HUGGING_FACE = Path(megalodon_mcore.__file__).parent / "hf"
CODE = sorted(path.name for path in HUGGING_FACE.glob("*_megalodon.py"))
AUTO_MAP = {
    "AutoConfig": "configuration_megalodon.MegalodonConfig",
    "AutoModel": "modeling_megalodon.MegalodonModel",
    "AutoModelForCausalLM": "modeling_megalodon.MegalodonForCausalLM",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINING = "megalodon_training"
"""Where config.json keeps how the model was trained."""


def open_hf(folder: Path) -> OpenModel:
    """Opens a folder, exported by this package or saved after fine-tuning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or is not what config.json says.
    """
    values = read_object(folder / "config.json")
    origin = str(folder / "config.json")
    if values.get("model_type") != "megalodon" or "hidden_size" not in values:
        raise ValueError(
            f"{origin} is not this package's Megalodon (a folder of pszemraj's port goes by "
            "--from megalodon-hf)."
        )
    # The configuration class derives what is left out; the model needs the numbers.
    values = _with_derived(values, origin)
    config = config_from(values, "hf", origin)
    tensors = TensorFolder(folder)
    known = {parameter.hf for parameter in parameters(config)}
    extra = tensors.names() - known - ({"lm_head.weight"} if config.tied else set())
    if extra:
        raise ValueError(f"{folder} has {min(extra)}, of which {origin} knows nothing.")
    named = values.get("dtype") or values.get("torch_dtype")
    if named is None:
        named = str(tensors.read("model.embed_tokens.weight").dtype).removeprefix("torch.")
    if not isinstance(named, str) or named not in DTYPES:
        raise ValueError(f"{origin} has dtype {named!r}; it takes {', '.join(DTYPES)}.")
    tokenizer = open_tokenizer(folder)
    if tokenizer is None and values.get("eos_token_id") is not None:
        tokenizer = Tokenizer(NULL_TOKENIZER, (), _first(values["eos_token_id"], origin))
    training = values.get(TRAINING)
    return OpenModel(
        folder,
        config,
        DTYPES[named],
        lambda parameter: tensors.read(parameter.hf),
        tokenizer,
        training if isinstance(training, dict) else {},
    )


def write_hf(
    model: OpenModel,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    progress: Callable[[Iterable[Parameter]], Iterable[Parameter]],
) -> None:
    """Writes all that AutoModelForCausalLM and AutoTokenizer need where this package is missing.

    Args:
        model: what to write.
        folder: an empty one.
        dtype: of all parameters that do not stay float32.
        max_shard_size: bytes in a file, unless one tensor has more.
        progress: wraps the loop over parameters.

    Raises:
        ValueError: the configuration class takes no such model.
    """
    _with_derived(model.config.named("hf"), str(model.folder))
    todo = list(parameters(model.config))
    entries = [Entry(p.hf, p.shape, model.written_dtype(p, dtype)) for p in todo]
    tensors = (model.read(parameter, dtype) for parameter in progress(todo))
    write_tensor_folder(folder, entries, tensors, max_shard_size)
    write_object(folder / "config.json", _configuration(model, dtype))
    write_object(folder / "generation_config.json", _generation(model))
    for name in CODE:
        shutil.copyfile(HUGGING_FACE / name, folder / name)
    if model.tokenizer:
        copy_tokenizer(model.tokenizer, folder)
        pad_on_the_left(folder)
    (folder / "README.md").write_text(model_card(model, dtype), encoding="utf-8")


def piece_length(chunk_size: int) -> int:
    """Steps to read at once: whole chunks."""
    return chunk_size * max(1, 2048 // chunk_size)


def _configuration(model: OpenModel, dtype: torch.dtype) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": "megalodon",
        "architectures": ["MegalodonForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
    }
    values |= model.config.named("hf")
    values["rope_theta"] = float(values["rope_theta"])
    values["use_cache"] = True
    values["piece_length"] = piece_length(model.config.chunk_size)
    if model.training:
        values[TRAINING] = model.training
    return values | _token_ids(model)


def _generation(model: OpenModel) -> dict[str, Any]:
    import transformers

    values = {"use_cache": True, "transformers_version": transformers.__version__}
    return values | _token_ids(model)


def _token_ids(model: OpenModel) -> dict[str, int]:
    if model.tokenizer is None:
        return {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(model.tokenizer, name) for name in names}
    return {name: value for name, value in ids.items() if value is not None}


def _with_derived(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """The configuration with what save_pretrained leaves out because it is the default."""
    from megalodon_mcore.hf import MegalodonConfig

    by_name = names("hf")
    own = {theirs: values[theirs] for theirs in by_name.values() if values.get(theirs) is not None}
    try:
        return MegalodonConfig(**own).to_dict() | values
    except ValueError as error:
        raise ValueError(f"{origin} describes no model: {error}") from None
    except TypeError as error:
        texts = {by_name[ours] for ours, kind in KINDS.items() if kind == "str"}
        wrong = [
            f"{name} is {value!r}"
            for name, value in own.items()
            if isinstance(value, str) and name not in texts
        ]
        raise ValueError(f"{origin} describes no model: {'; '.join(wrong) or error}.") from None


def _first(ids: Any, origin: str) -> int:
    found = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(found, int):
        raise ValueError(f"{origin} has eos_token_id {ids!r}; it takes an integer or several.")
    return found
