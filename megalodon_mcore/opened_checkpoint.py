"""What the commands that read a checkpoint of any format have in common: options and opening."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_mcore.config_sources import CONFIG_VARIABLE

if TYPE_CHECKING:
    from megalodon_mcore.conversion.model import OpenModel, Tokenizer


def add_checkpoint_arguments(parser: ArgumentParser, help: str) -> None:
    """Adds --checkpoint, of which `help` says what it takes, --iteration and --tokenizer."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=help)
    parser.add_argument(
        "--iteration", type=int, help="Which of training's checkpoints; the last one."
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="Folder or file of the tokenizer, if not the checkpoint's own.",
    )


def refuse_other_configuration() -> None:
    """Refuses the environment's values, which a checkpoint has of its own.

    Raises:
        ValueError: there are some.
    """
    if os.environ.get(CONFIG_VARIABLE):
        raise ValueError(
            f"{CONFIG_VARIABLE} is {os.environ[CONFIG_VARIABLE]!r}, but a checkpoint has its own "
            "configuration; unset it."
        )


def refuse_iteration(iteration: int | None, folder: Path) -> None:
    """Refuses an --iteration of a folder that is one checkpoint.

    Raises:
        ValueError: one is given.
    """
    if iteration is not None:
        raise ValueError(
            f"--iteration is {iteration}, but {folder} is one checkpoint; leave it out."
        )


def require_tokenizer(tokenizer: Tokenizer | None, place: Path) -> Tokenizer:
    """The tokenizer that was found at a place.

    Raises:
        ValueError: there was none.
    """
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer; give the place of one with --tokenizer.")
    return tokenizer


def open_checkpoint(folder: Path, iteration: int | None, tokenizer: Path | None) -> OpenModel:
    """Opens a checkpoint, whose format its files tell.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or an argument does not go with it.
    """
    from megalodon_mcore.checkpoint_tokenizer import MissingTokenizerError
    from megalodon_mcore.conversion.command import open_model
    from megalodon_mcore.conversion.tokenizers import open_tokenizer

    if tokenizer is not None and not (tokenizer.exists() and open_tokenizer(tokenizer)):
        raise ValueError(
            f"--tokenizer is {tokenizer}, which holds no tokenizer; it takes a Hugging Face folder "
            "or a SentencePiece model."
        )
    source = "mcore"
    if (folder / "config.json").is_file():
        source = "released" if (folder / "consolidate_config.json").is_file() else "hf"
        refuse_iteration(iteration, folder)
    given = dict(source=source, input=folder, iteration=iteration, tokenizer=tokenizer)
    try:
        return open_model(Namespace(**given, vocab_size=None))
    except MissingTokenizerError as error:
        raise ValueError(f"{error.reason}; give its place with --tokenizer.") from None
