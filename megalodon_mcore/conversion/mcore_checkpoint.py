"""Megatron's torch_dist checkpoints, read from any parallel layout and written for any.

In a checkpoint every tensor is whole, and a joined weight keeps its parts apart: linear_proj.weight
as `_h1` and `_h2`, linear_fc1.weight as W1 over W3. Layers are stacked along a first axis where all
are of one kind, and else each has tensors of its own; a layer's experts are stacked in either case.
"""

from __future__ import annotations

import contextlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megalodon_mcore.config import MegalodonConfig, config_from_arguments
from megalodon_mcore.conversion.mcore_arguments import (
    arguments_for,
    dtype_of,
    tokenizer_of,
    training_of,
)
from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER, copy_tokenizer
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader, safe_load
from megalodon_mcore.conversion.torch_dist_writer import TorchDistWriter
from megalodon_mcore.parameters import (
    LAYER_PREFIXES,
    Parameter,
    checkpoint_suffix,
    linear_modules,
    parameters,
)

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
EMBEDDING = "embedding.word_embeddings.weight"
PADDED = (EMBEDDING, "output_layer.weight")
LAYER = LAYER_PREFIXES["mcore"]
OF_EXPERTS = "experts.experts."
OUTPUT_STATE = "output_layer._extra_state/shard_0_1"
"""HybridModel alone saves it; it is Transformer Engine's, and nothing."""
PREDICTING = "mtp."
"""What the names of layers that predict further tokens begin with."""


def open_mcore(
    folder: Path,
    iteration: int | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
) -> OpenModel:
    """Opens a checkpoint.

    Args:
        folder: what training had as --save, or one of its iter_ folders.
        iteration: which of its checkpoints; the last one by default.
        tokenizer: where the tokenizer is, if not where training had it.
        vocab_size: the number of its tokens, likewise.

    Raises:
        FileNotFoundError: there is no finished checkpoint.
        ValueError: it is damaged, would run code, or is not Megalodon's.
    """
    checkpoint = checkpoint_folder(folder, iteration)
    if not (checkpoint / ".metadata").is_file() and any(checkpoint.glob("mp_rank_*/*.pt")):
        raise ValueError(
            f"{checkpoint} is of --ckpt-format torch and convert reads torch_dist; training's "
            f"arguments with --load {folder} --ckpt-convert-format torch_dist "
            "--ckpt-convert-save FOLDER make one."
        )
    reader = TorchDistReader(checkpoint)
    common = common_state(reader)
    arguments = common["args"]
    embedding = reader.shape(EMBEDDING)
    if embedding is None:
        raise ValueError(
            f"{checkpoint} has no {EMBEDDING}; convert reads Megalodon's checkpoints of "
            "--ckpt-format torch_dist."
        )
    found, true_vocab_size = tokenizer_of(
        arguments, checkpoint.absolute().parent, embedding[0], tokenizer, vocab_size
    )
    config = config_from_arguments(arguments, true_vocab_size, str(checkpoint))
    model = OpenModel(
        checkpoint,
        config,
        dtype_of(arguments),
        lambda parameter: _fetch(reader, parameter, config),
        found,
        training_of(arguments, int(common.get("iteration", 0))),
        _left_out(reader, arguments),
    )
    _refuse_others(reader, config)
    return model


def checkpoint_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of one of the checkpoints under --save.

    Raises:
        FileNotFoundError: there is no finished one.
        ValueError: the tracker file makes no sense.
    """
    if iteration is not None:
        return folder / f"iter_{iteration:07d}"
    if (folder / ".metadata").is_file():
        return folder
    if not (folder / TRACKER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished checkpoint; give the folder that training had as --save."
        )
    text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,15}", text):
        raise ValueError(f"{folder / TRACKER} has {text[:40]!r}; it takes a number or 'release'.")
    return folder / (text if text == "release" else f"iter_{int(text):07d}")


def write_mcore(
    model: OpenModel,
    folder: Path,
    dtype: torch.dtype,
    final_folder: Path,
    divisible_by: int,
    progress: Callable[[Iterable[Parameter]], Iterable[Parameter]],
) -> None:
    """Writes a checkpoint that --load takes, as Megatron's `release`, which starts at iteration 0.

    Rows that pad the vocabulary are zeros.

    Args:
        model: what to write.
        folder: an empty one.
        dtype: of all parameters that do not stay float32.
        final_folder: where the folder will be, for the tokenizer's place in the arguments.
        divisible_by: of what the padded vocabulary is a multiple.
        progress: wraps the loop over parameters.
    """
    tokenizer_place = None
    if model.tokenizer and model.tokenizer.kind != NULL_TOKENIZER:
        copy_tokenizer(model.tokenizer, folder / "tokenizer")
        tokenizer_place = final_folder.absolute() / "tokenizer"
        if model.tokenizer.kind != "HuggingFaceTokenizer":
            tokenizer_place = tokenizer_place / "tokenizer.model"
    arguments = arguments_for(model, dtype, divisible_by, tokenizer_place)
    (folder / "release").mkdir()
    with contextlib.closing(TorchDistWriter(folder / "release")) as writer:
        stacked = len(set(model.config.symbols)) == 1
        for parameter in progress(list(parameters(model.config))):
            _write(writer, parameter, model.read(parameter, dtype), stacked, arguments)
        for key in _extra_states(model.config, stacked):
            writer.write_object(key, [None])
        if getattr(arguments, "hybrid_layer_pattern", None):
            writer.write_object(OUTPUT_STATE, [None])
        common = {
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
            },
        }
        writer.write_object(COMMON, [common])
        writer.finish()
    (folder / TRACKER).write_text("release")


def common_state(reader: TorchDistReader) -> dict:
    """What every rank has alike: arguments, iteration, schedules.

    Raises:
        ValueError: it is damaged, or has no arguments.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    legacy = reader.folder / "common.pt"
    if legacy.is_file():
        common = safe_load(legacy, str(legacy), SAFE_GLOBALS)
    else:
        common = reader.read_object(COMMON, SAFE_GLOBALS)
        common = common[0] if isinstance(common, list) and common else common
    if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
        raise ValueError(f"{reader.folder} does not have the arguments it was trained with.")
    return common


def _key(parameter: Parameter, stacked: bool) -> str:
    """The tensor of the checkpoint that has a parameter, of all layers or of its own."""
    row = parameter.row
    name = f"{row.mcore}{checkpoint_suffix(row)}"
    if parameter.layer is None:
        return name
    return f"{LAYER}{name}" if stacked else f"{LAYER}{parameter.layer}.{name}"


def _key_of_layer(reader: TorchDistReader, parameter: Parameter) -> tuple[str, bool]:
    """The tensor that has a parameter, and whether it has all layers' stacked."""
    key = _key(parameter, True)
    if parameter.layer is None or reader.shape(key) is not None:
        return key, parameter.layer is not None
    # Layers are not stacked where they differ, or where Megatron found that they may.
    return _key(parameter, False), False


def _joined_axis(parameter: Parameter, swiglu: bool) -> int | None:
    """The axis along which that tensor has W1 over W3, if it does."""
    part = parameter.row.part
    return None if part is None or part.apart or not swiglu else part.axis


def _shape_in_layer(parameter: Parameter, swiglu: bool) -> tuple[int, ...]:
    """The shape of one layer of that tensor."""
    joined = _joined_axis(parameter, swiglu)
    return tuple(2 * z if axis == joined else z for axis, z in enumerate(parameter.shape))


def _offsets_in_layer(parameter: Parameter, swiglu: bool) -> tuple[int, ...]:
    """Where in that layer the parameter begins."""
    joined, part = _joined_axis(parameter, swiglu), parameter.row.part
    return tuple(
        part.index * z if part is not None and axis == joined else 0
        for axis, z in enumerate(parameter.shape)
    )


def _fetch(reader: TorchDistReader, parameter: Parameter, config: MegalodonConfig) -> Tensor:
    key, stacked = _key_of_layer(reader, parameter)
    whole = reader.shape(key)
    if whole is None:
        raise ValueError(f"{reader.folder} has no {key}.")
    expected = _shape_in_layer(parameter, config.swiglu)
    if stacked:
        expected = (config.num_layers, *expected)
    padded = parameter.row.mcore in PADDED and whole[:1] >= expected[:1]
    if whole[padded:] != expected[padded:]:
        raise ValueError(
            f"{key} has shape {list(whole)} in {reader.folder}; its arguments make it "
            f"{list(expected)}."
        )
    offsets = _offsets_in_layer(parameter, config.swiglu)
    ranges = [(a, a + size) for a, size in zip(offsets, parameter.shape, strict=True)]
    if not stacked:
        return reader.read(key, ranges)
    return reader.read(key, [(parameter.layer, parameter.layer + 1), *ranges]).squeeze(0)


def _left_out(reader: TorchDistReader, arguments: Namespace) -> str:
    """A sentence on the layers that only training has any use for; empty where there are none."""
    if not any(key.startswith(PREDICTING) for key in reader.entries):
        return ""
    count = getattr(arguments, "mtp_num_layers", None)
    return (
        f"{reader.folder} has {count or 'some'} multi-token prediction layers beside the model; "
        "they are left out."
    )


def _refuse_others(reader: TorchDistReader, config: MegalodonConfig) -> None:
    known = {_key_of_layer(reader, parameter)[0] for parameter in parameters(config)}
    prefixes = ("embedding.", "decoder.", "output_layer.")
    for key in reader.entries:
        if key.startswith(prefixes) and reader.shape(key) is not None and key not in known:
            raise ValueError(f"{reader.folder} has {key}, of which its arguments know nothing.")


def _write(
    writer: TorchDistWriter,
    parameter: Parameter,
    tensor: Tensor,
    stacked: bool,
    arguments: Namespace,
) -> None:
    key, offsets = _key(parameter, stacked), _offsets_in_layer(parameter, arguments.swiglu)
    shape = _shape_in_layer(parameter, arguments.swiglu)
    if parameter.row.mcore in PADDED:
        shape = (arguments.padded_vocab_size, *shape[1:])
        if shape[0] > len(tensor):
            padding = tensor.new_zeros(shape[0] - len(tensor), *shape[1:])
            writer.write(key, shape, (len(tensor), 0), padding)
    if stacked and parameter.layer is not None:
        shape, offsets = (arguments.num_layers, *shape), (parameter.layer, *offsets)
        tensor = tensor.unsqueeze(0)
    writer.write(key, shape, offsets, tensor)


def _extra_states(config: MegalodonConfig, stacked: bool) -> Iterator[str]:
    """The keys of the (empty) extra states that Megatron's linear layers each want."""
    for layer, symbol in enumerate(config.symbols):
        own = LAYER if stacked else f"{LAYER}{layer}."
        stack = [(layer, config.num_layers)] if stacked else []
        for module in linear_modules(config, symbol):
            experts: Iterable[int | None] = (None,)
            if OF_EXPERTS in module:
                experts = range(config.num_experts)
            for expert in experts:
                places = stack if expert is None else [*stack, (expert, config.num_experts)]
                offsets, sizes = zip(*places or [(0, 1)], strict=True)
                shard = f"{'.'.join(map(str, offsets))}_{'.'.join(map(str, sizes))}"
                yield f"{own}{module}._extra_state/shard_{shard}"
