"""One sentence for a checkpoint that cannot be loaded, whatever Megatron and torch say of it."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.conversion.json_file import read_object
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; one sentence says why."""


@contextmanager
def in_one_sentence(place: Path) -> Iterator[None]:
    """Around what loads a checkpoint.

    Megatron and torch meet a damaged file with errors of many kinds: some are no Exception, some
    name no file, and some exit with status 0.

    Args:
        place: the folder of this one checkpoint.

    Raises:
        CheckpointError: for any of them.
    """
    try:
        yield
    except (KeyboardInterrupt, CheckpointError):
        raise
    except BaseException as error:
        raise CheckpointError(_sentence(place, _cause(error))) from error


def loading(arguments: Any) -> AbstractContextManager[None]:
    """The same around what loads the checkpoint that Megatron's or Bridge's arguments name.

    Raises:
        CheckpointError: the file that says which checkpoint is the last makes no sense.
    """
    # Here, because it imports modules that raise this one's error.
    from megalodon_mcore.conversion.mcore_checkpoint import TRACKER, checkpoint_folder

    for name in ("load", "pretrained_checkpoint"):
        folder = getattr(arguments, name, None)
        if folder is not None and (Path(folder) / TRACKER).is_file():
            try:
                place = checkpoint_folder(Path(folder), getattr(arguments, "ckpt_step", None))
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            return in_one_sentence(place)
    return nullcontext()


def load_in_one_sentence(module: ModuleType, arguments_of: Callable[..., Any]) -> None:
    """Puts `loading` around a module's load_checkpoint.

    Args:
        module: what calls it by this name.
        arguments_of: finds the arguments, given those of the call.
    """
    load = module.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with loading(arguments_of(*args, **kwargs)):
            return load(*args, **kwargs)

    module.load_checkpoint = load_checkpoint


def _cause(error: BaseException) -> BaseException:
    """The error itself where torch's CheckpointException has one for each rank that met it."""
    while failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    return error


def _sentence(place: Path, error: BaseException) -> str:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    advice = "restore what is damaged from a copy or take another of the run's checkpoints"
    # Of tensors that the model has not, or has in another shape; then no file is damaged.
    is_mismatch = isinstance(error, CheckpointingException)
    damage = None if is_mismatch else _damage_in(place)
    if damage is not None:
        return f"{damage}; {advice}."
    if is_mismatch or isinstance(error, KeyError):
        advice = "give the arguments that it was trained with"
    return f"{place} could not be loaded: {_said(error)}; {advice}."


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return "Megatron has said why above"
    said, name = textwrap.shorten(first_line(error), 300, placeholder="..."), type(error).__name__
    speaks = isinstance(error, (ValueError, SystemExit)) or name == "CheckpointingException"
    return said if speaks or said == name else f"{name}: {said}"


def _damage_in(place: Path) -> str | None:
    """Says what is wrong with a file of a torch_dist checkpoint; None where each can be read."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    from megalodon_mcore.conversion.mcore_checkpoint import COMMON

    # All of it is read, which not every rank of a large run need do.
    if any(place.glob("mp_rank_*")) or os.environ.get("RANK", "0") != "0":
        return None
    try:
        reader = TorchDistReader(place)
        if COMMON in reader.entries:  # Objects of other formats are of any class.
            reader.read_all(SAFE_GLOBALS)
            read_object(place / "metadata.json")
    except (ValueError, FileNotFoundError) as error:
        return str(error).removesuffix(".")
    except Exception as error:  # Bytes that changed can say anything.
        return f"{place} is damaged ({type(error).__name__}: {first_line(error)})"
    return None
