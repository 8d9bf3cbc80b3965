"""What a model remembers of the text it has read, in one safetensors file.

The file has some MiB whatever the text's length, but for attention layers (`*`), and goes on where
the text ended, on another machine too. It belongs to the model that read it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalodon_mcore.hf.cache_megalodon import ROWS, MegalodonCache, set_state
from megalodon_mcore.hf.configuration_megalodon import MegalodonConfig
from megalodon_mcore.hf.modeling_megalodon import MegalodonForCausalLM
from megalodon_mcore.tensor_digest import tensor_digest
from megalodon_mcore.whole_file import write_whole

KIND = "megalodon state 1"
OTHER_VALUES = {"dropout", "hidden_dropout", "attention_dropout", "megalodon_init_mode"}
OTHER_VALUES |= {"use_cache", "piece_length", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Of a configuration, which change nothing that is remembered."""
FINGERPRINT_VALUES = 1024
"""Of each parameter: a step of training changes every one, and reading all would take minutes."""


class State(NamedTuple):
    """What a state file has: a cache to go on with, and the tokens to feed it first."""

    cache: MegalodonCache
    next_tokens: Tensor
    """int64 [batch, any number], read but not yet fed."""


def fingerprint(model: MegalodonForCausalLM) -> str:
    """Tells models apart: by configuration, and names, types and values of parameters."""
    digest = hashlib.sha256(repr(sorted(_shape_of(model).items())).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // FINGERPRINT_VALUES)
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(flat[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _shape_of(model: MegalodonForCausalLM) -> dict[str, object]:
    """Of the configuration, what changes what the model computes."""
    names = MegalodonConfig.__annotations__.keys() - OTHER_VALUES
    return {name: getattr(model.config, name) for name in names}


def save_state(
    path: Path, model: MegalodonForCausalLM, cache: MegalodonCache, next_tokens: Tensor
) -> None:
    """Writes what `model` remembers in `cache`; the file is whole or not there.

    Args:
        path: the file.
        model: the one that filled the cache.
        cache: with at least one step.
        next_tokens: int64 [batch, any number], which come next and are not yet fed.

    Raises:
        ValueError: the cache is empty, or has steps taken back since it was last fed.
        OSError: the file cannot be written.
    """
    if cache.seen is None or cache.again is not None:
        raise ValueError(
            "The cache was fed nothing, or has had steps taken back since; feed it before it is "
            "saved."
        )
    tensors = remembered(cache, model)
    tensors["next_tokens"] = next_tokens.to("cpu", torch.int64).contiguous()
    about = {"kind": KIND, "model": fingerprint(model), "content": tensor_digest(tensors)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=about))


def remembered(cache: MegalodonCache, model: MegalodonForCausalLM) -> dict[str, Tensor]:
    """Copies on the CPU of all that a cache needs to go on; nothing where it was fed nothing."""
    if cache.seen is None:
        return {}
    tensors = {"seen": cache.seen}
    for layer, state in enumerate(cache.states):
        for name in ROWS & state.keys():
            tensors[f"{layer}.{name}"] = _reached(cache, model, layer, name)
    return {name: z.detach().to("cpu", copy=True).contiguous() for name, z in tensors.items()}


def _reached(cache: MegalodonCache, model: MegalodonForCausalLM, layer: int, name: str) -> Tensor:
    """A state's tensor, of keys and values only those that something can still look at."""
    value = cache.states[layer][name]
    if name not in ("keys", "values"):
        return value
    fills = cache.seen.to(value.device)
    if layer not in cache.attention:
        fills = fills % model.config.chunk_size
    most = int(fills.max())
    reached = torch.arange(most, device=value.device) < fills[:, None]
    return value[:, :, :most].masked_fill(~reached[:, None, :, None], 0)


def load_state(
    path: Path,
    model: MegalodonForCausalLM,
    is_compileable: bool = False,
    max_length: int | None = None,
) -> State:
    """What `save_state` wrote, on the model's device.

    The cache counts no step, so that `generate` takes what it is given for all there is; give it
    the next tokens and what is to follow them.

    Args:
        path: the file.
        model: the one that it was written with.
        is_compileable: as MegalodonCache takes it; and
        max_length: likewise.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, of something else, or of another model.
    """
    tensors = _read(path, model)
    next_tokens = tensors.pop("next_tokens").to(model.device)
    return State(cache_with(model, tensors, is_compileable, max_length), next_tokens)


def cache_with(
    model: MegalodonForCausalLM,
    tensors: dict[str, Tensor],
    is_compileable: bool = False,
    max_length: int | None = None,
) -> MegalodonCache:
    """A cache that goes on from what `remembered` returned, to the bit."""
    cache = MegalodonCache(model.config, is_compileable, max_length)
    if not tensors:
        return cache
    seen = tensors["seen"]
    with torch.no_grad():
        shape = (len(seen), 1, model.config.hidden_size)
        cache.allocate(model.model, torch.empty(shape, dtype=model.dtype, device=model.device))
        cache.make_room(int(seen.max()))
        cache.seen.copy_(seen)
        for name, value in tensors.items():
            layer, _, kind = name.partition(".")
            if not kind:
                continue
            state = cache.states[int(layer)]
            if kind in ("keys", "values"):
                # Of more slots than are in use the others hold nothing.
                value = value[:, :, : state[kind].shape[2]]
                state[kind][:, :, : value.shape[2]] = value
            else:
                set_state(state, kind, value)
    return cache


def _read(path: Path, model: MegalodonForCausalLM) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != KIND:
                raise ValueError(f"{path} is no state of a Megalodon; `state save` writes one.")
            if about.get("model") != fingerprint(model):
                raise ValueError(
                    f"{path} was written by another model, or by the same one with other values or "
                    "in another precision; read the text with this one."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if about.get("content") != tensor_digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were written.")
    return tensors
