"""The tokenizer that lies in a checkpoint's folder and moves with it.

`pretrain` copies the tokenizer that it trains with to `tokenizer/` below --save, as `convert` does
below OUT. What a checkpoint's arguments say of its place is true only where it was written.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

from megalodon_mcore.checkpoint_errors import CheckpointError

FOLDER = "tokenizer"
ARGUMENTS = ("tokenizer_type", "tokenizer_model")
SUFFIXES = {".json", ".jinja", ".model", ".txt", ".spm", ".bpe", ".tiktoken", ".py"}
"""Of a folder's files, those that a tokenizer may need, and no weights."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FOLDER_KIND = "HuggingFaceTokenizer"


class MissingTokenizerError(ValueError):
    """A checkpoint's tokenizer is nowhere to be found.

    Args:
        reason: where it was looked for.
        advice: what would help.
    """

    def __init__(self, reason: object, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


def keep_with_checkpoints(save: Path, tokenizer: Path) -> None:
    """Copies a tokenizer, a folder or a file, to where the checkpoints under `save` have theirs.

    What is there already is replaced where it differs: the newest checkpoint's tokenizer it is.
    """
    if tokenizer.is_dir():
        found = [path for path in tokenizer.iterdir() if path.suffix in SUFFIXES]
    else:
        found = [tokenizer]
    files = {path.name: path for path in found if path.is_file()}
    place = save / FOLDER
    if not files or _holds(place, files):
        return
    # The name is given last, so that no half of a tokenizer ever has it.
    temporary = save / f".{FOLDER}.{os.getpid()}.partial"
    temporary.mkdir(parents=True)
    try:
        for name, path in files.items():
            shutil.copyfile(path, temporary / name)
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_of_checkpoint(checkpoint: Path, kind: str | None, recorded: str | None) -> Path:
    """Where a checkpoint's tokenizer is now: in its folder, or else where its arguments say.

    Args:
        checkpoint: the folder that training had as --save.
        kind: its --tokenizer-type.
        recorded: its --tokenizer-model.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    inside, said = checkpoint / FOLDER, Path(str(recorded))
    candidates = [inside / said.name, inside / "tokenizer.model", said]
    if kind == FOLDER_KIND:
        candidates = [inside, said]
    for place in candidates:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"The tokenizer of the training run is neither in {inside} nor where it was, {recorded}"
    )


def settle_arguments(args: Namespace, written: dict[str, str | None], option: str) -> None:
    """Sets the tokenizer's arguments once a checkpoint's have been read: what was written wins.

    Args:
        args: Megatron's, with those of the checkpoint under --load.
        written: what the command line had of ARGUMENTS.
        option: by which the user names a tokenizer's place, for the error.

    Raises:
        CheckpointError: the checkpoint's tokenizer is missing and no other was named.
    """
    kind, model = (written[name] for name in ARGUMENTS)
    if kind not in (None, args.tokenizer_type):
        # The checkpoint's place has nothing of this kind.
        args.tokenizer_type, args.tokenizer_model = kind, model
        return
    recorded = args.tokenizer_model
    if model is not None or recorded is None:
        args.tokenizer_model = model
        return
    try:
        place = tokenizer_of_checkpoint(Path(args.load), args.tokenizer_type, recorded)
    except FileNotFoundError as error:
        # Hugging Face knows tokenizers by name, too.
        if args.tokenizer_type == FOLDER_KIND and HUB_NAME.fullmatch(recorded):
            return
        raise CheckpointError(f"{error}; give its place with {option}.") from None
    args.tokenizer_model = str(place)


def _holds(place: Path, files: dict[str, Path]) -> bool:
    if not place.is_dir() or {path.name for path in place.iterdir()} != files.keys():
        return False
    return all(filecmp.cmp(place / name, path, shallow=False) for name, path in files.items())
