"""Consolidated checkpoints of the released code (github XuezheMax/megalodon, reloading.py).

`config.json` has the training configuration with ModelConf and TokenizerConf, `consolidate_config.
json` the type and the number of model-parallel ranks, and `consolidated.pth`, or `consolidated.
NN.pth` of each rank, a state_dict: names and axes as in megalodon/model and megalodon/modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_mcore.config import MegalodonConfig, config_from
from megalodon_mcore.conversion.json_file import read_object, write_object
from megalodon_mcore.conversion.model import OpenModel, Tokenizer
from megalodon_mcore.conversion.tokenizers import (
    NULL_TOKENIZER,
    copy_tokenizer,
    open_tokenizer,
)
from megalodon_mcore.conversion.torch_dist_reader import safe_load
from megalodon_mcore.conversion.torch_file import TorchFile
from megalodon_mcore.parameters import Parameter, parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUT, EMBEDDING, FREQUENCIES = "output.output.weight", "embed.weight", "rope.freqs"
TRAINING = "megalodon_mcore_training"


def open_released(folder: Path) -> OpenModel:
    """Opens a checkpoint; its files are mapped into memory, not read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, would run code, or is not what the configuration says.
    """
    consolidated = read_object(folder / "consolidate_config.json")
    ranks, dtype = consolidated.get("model_parallel_size"), consolidated.get("dtype")
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= 100:
        raise ValueError(f"{folder}/consolidate_config.json has model_parallel_size {ranks!r}.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{folder}/consolidate_config.json has dtype {dtype!r}.")
    configuration = read_object(folder / "config.json")
    values = configuration.get("model")
    if not isinstance(values, dict):
        raise ValueError(f"{folder}/config.json has no model.")
    shards = [_load(folder / name) for name in file_names(ranks)]
    values = dict(values)
    if values.get("init_mode") == "none":  # what the released code sets before it loads weights
        del values["init_mode"]
    if values.get("vocab_size", -1) == -1:
        values["vocab_size"] = len(_tensor(shards[0], EMBEDDING, folder))
    _refuse_unusual(values, folder)
    config = config_from(values, "released", f"{folder}/config.json")
    _check_keys(shards, config, folder)
    _check_constants(shards, config, folder)
    training = configuration.get(TRAINING)
    return OpenModel(
        folder,
        config,
        DTYPES[dtype],
        lambda parameter: _joined(shards, parameter, folder),
        _tokenizer(configuration, folder),
        training if isinstance(training, dict) else {},
    )


def write_released(
    model: OpenModel,
    folder: Path,
    dtype: torch.dtype,
    ranks: int,
    progress: Callable[[Iterable[Parameter]], Iterable[Parameter]],
) -> None:
    """Writes a checkpoint for so many model-parallel ranks.

    Raises:
        ValueError: the ranks do not divide the model, or it has layers of which the format knows
            nothing.
    """
    shape = model.config
    if shape.layers is not None:
        raise ValueError(
            f"{model.folder} has layers {shape.layers}, and the released format plain blocks (M) "
            "alone; take --to hf or --to mcore."
        )
    _check_ranks(shape, ranks)
    todo = list(parameters(shape))
    layout = {p.released: (_split_shape(p, ranks), model.written_dtype(p, dtype)) for p in todo}
    layout = {EMBEDDING: layout.pop(EMBEDDING), FREQUENCIES: _like(frequencies(shape))} | layout
    layout.setdefault(OUTPUT, layout[EMBEDDING])
    constants = dict(_priors(shape, ranks)) | {FREQUENCIES: frequencies(shape)}
    layout |= {name: _like(tensor) for name, tensor in constants.items()}
    files = [TorchFile(folder / name, layout) for name in file_names(ranks)]
    try:
        for name, tensor in constants.items():
            for file in files:
                file.write(name, tensor)
        for parameter in progress(todo):
            whole = model.read(parameter, dtype)
            names = [parameter.released]
            if parameter.released == EMBEDDING and shape.tied:
                names.append(OUTPUT)
            for file, part in zip(files, _parts(whole, parameter.row.split, ranks), strict=True):
                for name in names:
                    file.write(name, part)
    finally:
        for file in files:
            file.close()
    names = {value: key for key, value in DTYPES.items()}
    write_object(
        folder / "consolidate_config.json",
        {"model_parallel_size": ranks, "dtype": names[dtype]},
    )
    write_object(folder / "config.json", _configuration(model, ranks, folder))


def file_names(ranks: int) -> list[str]:
    """The ranks' files, as reloading.get_consolidated_ckpt_path names them."""
    if ranks == 1:
        return ["consolidated.pth"]
    return [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]


def frequencies(config: MegalodonConfig) -> Tensor:
    """The buffer `rope.freqs`: float32 [Z / heads / 2], computed as the released code does."""
    width = config.z_dim // config.num_heads
    powers = [config.rotary_base ** (j / width) for j in range(0, width, 2)]
    return 1.0 / torch.tensor(powers, dtype=torch.float32)


def _priors(config: MegalodonConfig, ranks: int) -> Iterable[tuple[str, Tensor]]:
    """TimestepNorm's buffers: a count of zero, and what it then makes no use of."""
    prefixes = [f"layers.{layer}.mega.timenorm" for layer in range(config.num_layers)]
    for prefix in (*prefixes, "output.final_norm"):
        yield f"{prefix}.prior_count", torch.tensor(0)
        for name in ("prior_mean", "prior_logv"):
            yield f"{prefix}.{name}", torch.zeros(config.norm_num_groups // ranks)


def _like(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _parts(whole: Tensor, axis: int | None, ranks: int) -> tuple[Tensor, ...]:
    return (whole,) * ranks if axis is None else whole.chunk(ranks, dim=axis)


def _split_shape(parameter: Parameter, ranks: int) -> tuple[int, ...]:
    axis = parameter.row.split
    return tuple(z // ranks if i == axis else z for i, z in enumerate(parameter.shape))


def _check_ranks(config: MegalodonConfig, ranks: int) -> None:
    for name in ("num_heads", "norm_num_groups", "hidden_size", "ffn_hidden_size"):
        if ranks < 1 or getattr(config, name) % ranks:
            raise ValueError(
                f"--model-parallel-size is {ranks}; it takes a divisor of {name}, which is "
                f"{getattr(config, name)}."
            )


def _configuration(model: OpenModel, ranks: int, folder: Path) -> dict[str, Any]:
    values = model.config.named("released")
    values |= {"output_size": -1, "norm_affine": True, "efficient_attn": None}
    values["rope_base"] = float(values["rope_base"])
    tokenizer: dict[str, Any] = {"path": None}
    if model.tokenizer and model.tokenizer.files:
        copy_tokenizer(model.tokenizer, folder / "tokenizer")
        if (folder / "tokenizer" / "tokenizer.model").is_file():
            tokenizer["path"] = "tokenizer/tokenizer.model"
    configuration: dict[str, Any] = {
        "model": values,
        "tokenizer": tokenizer,
        "model_parallel_size": ranks,
        "chunk_parallel_size": 1,
    }
    if model.training:
        configuration[TRAINING] = model.training
    if model.tokenizer and model.tokenizer.kind == NULL_TOKENIZER:
        configuration["megalodon_mcore_eos_token_id"] = model.tokenizer.eos_token_id
    return configuration


def _tokenizer(configuration: dict[str, Any], folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer").is_dir():
        return open_tokenizer(folder / "tokenizer")
    if "megalodon_mcore_eos_token_id" in configuration:
        return Tokenizer(NULL_TOKENIZER, (), configuration["megalodon_mcore_eos_token_id"])
    own = configuration.get("tokenizer")
    path = own.get("path") if isinstance(own, dict) else None
    place = folder / path if isinstance(path, str) else None
    return open_tokenizer(place) if place and place.is_file() else None


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    shard = safe_load(path, str(path), [], mmap=True)
    if not isinstance(shard, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in shard.items()
    ):
        raise ValueError(f"{path} holds no tensors by name.")
    return shard


def _tensor(shard: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in shard:
        raise ValueError(f"{folder} has no {name}.")
    return shard[name]


def _joined(shards: list[dict[str, Tensor]], parameter: Parameter, folder: Path) -> Tensor:
    parts = [_tensor(shard, parameter.released, folder) for shard in shards]
    expected = _split_shape(parameter, len(shards))
    for part in parts:
        if tuple(part.shape) != expected:
            raise ValueError(
                f"{parameter.released} has shape {list(part.shape)} in {folder}; its configuration "
                f"makes it {list(expected)} on {len(shards)} ranks."
            )
    if parameter.row.split is None:
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise ValueError(f"{parameter.released} differs between the ranks in {folder}.")
        return parts[0]
    return torch.cat(parts, dim=parameter.row.split) if len(parts) > 1 else parts[0]


def _check_keys(shards: list[dict], config: MegalodonConfig, folder: Path) -> None:
    known = {parameter.released for parameter in parameters(config)}
    known |= {OUTPUT, FREQUENCIES} | {name for name, _ in _priors(config, 1)}
    for shard in shards:
        for kind, names in (("has no", known - set(shard)), ("has", set(shard) - known)):
            if names:
                after = "" if kind == "has no" else ", of which its configuration knows nothing"
                raise ValueError(f"{folder} {kind} {min(names)}{after}.")


def _check_constants(shards: list[dict], config: MegalodonConfig, folder: Path) -> None:
    width = config.z_dim // config.num_heads
    if any(tuple(shard[FREQUENCIES].shape) != (-(-width // 2),) for shard in shards):
        raise ValueError(
            f"{FREQUENCIES} in {folder} has not the width of its configuration's z_dim."
        )
    expected = frequencies(config)
    for shard in shards:
        found = shard[FREQUENCIES]
        # A model that was cast to bf16 has its buffers cast as well.
        rtol = 1e-5 if found.dtype == torch.float32 else 1e-2
        if found.shape != expected.shape or not torch.allclose(
            found.float(), expected, rtol=rtol, atol=0
        ):
            raise ValueError(
                f"{FREQUENCIES} in {folder} is not what the configuration's rope_base, z_dim and "
                "num_heads make it."
            )
        for name, _ in _priors(config, 1):
            if shard[name].count_nonzero():
                raise ValueError(f"{name} in {folder} is not zero; learned priors are not known.")
        if config.tied and not torch.equal(shard[OUTPUT], shard[EMBEDDING]):
            raise ValueError(f"{OUTPUT} differs from {EMBEDDING} in {folder}, which ties them.")


def _refuse_unusual(values: dict[str, Any], folder: Path) -> None:
    if values.get("norm_affine") is False:
        raise ValueError(f"{folder}/config.json has norms without weights (norm_affine).")
    if values.get("output_size", -1) not in (-1, values["vocab_size"]):
        raise ValueError(f"{folder}/config.json has an output_size other than vocab_size.")
