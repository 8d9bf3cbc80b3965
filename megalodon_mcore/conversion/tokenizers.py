"""The files that make up a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.conversion.json_file import read_object, write_object
from megalodon_mcore.conversion.model import Tokenizer

NULL_TOKENIZER = "NullTokenizer"
"""Megatron's tokenizer of numbers: a model that was trained without text."""

HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)


def open_tokenizer(place: Path) -> Tokenizer | None:
    """A Hugging Face tokenizer folder's, or a SentencePiece model's; None if it is neither.

    Raises:
        ValueError: its files are there but cannot be read.
    """
    if place.is_file():
        return _sentencepiece(place)
    files = tuple(place / name for name in HF_FILES if (place / name).is_file())
    names = {file.name for file in files}
    if "tokenizer_config.json" not in names and "tokenizer.json" not in names:
        return _sentencepiece(place / "tokenizer.model") if "tokenizer.model" in names else None
    loaded = load_tokenizer(place)
    return Tokenizer(
        "HuggingFaceTokenizer",
        files,
        loaded.eos_token_id,
        loaded.bos_token_id,
        loaded.pad_token_id,
    )


def tokenizer_vocab_size(tokenizer: Tokenizer | None) -> int | None:
    """How many tokens there are; None where nothing says."""
    if tokenizer is None or not tokenizer.files:
        return None
    if tokenizer.kind == "HuggingFaceTokenizer":
        return len(load_tokenizer(tokenizer.files[0].parent))
    return load_processor(tokenizer.files[0]).vocab_size()


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copies the tokenizer's files into a folder, made where it is missing."""
    folder.mkdir(exist_ok=True)
    for file in tokenizer.files:
        name = file.name if tokenizer.kind == "HuggingFaceTokenizer" else "tokenizer.model"
        shutil.copyfile(file, folder / name)


def pad_on_the_left(folder: Path) -> None:
    """Makes left the side where a Hugging Face tokenizer pads by default, as generation wants."""
    config = folder / "tokenizer_config.json"
    if config.is_file() or (folder / "tokenizer.json").is_file():
        values = read_object(config) if config.is_file() else {}
        write_object(config, values | {"padding_side": "left"})


def load_tokenizer(folder: Path):  # noqa: ANN201
    """A Hugging Face tokenizer.

    Raises:
        ValueError: its files cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # A model's config.json beside the tokenizer would want its own code run.
    config = folder / "tokenizer_config.json"
    name = read_object(config).get("tokenizer_class") if config.is_file() else None
    try:
        if (folder / "tokenizer.json").is_file() and name in (
            None,
            "PreTrainedTokenizerFast",
            "TokenizersBackend",
        ):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        # False, since left out it asks on standard input.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"The tokenizer in {folder} does not load: {first_line(error)}.") from None


def _sentencepiece(path: Path) -> Tokenizer:
    processor = load_processor(path)
    ids = (processor.eos_id(), processor.bos_id(), processor.pad_id())
    return Tokenizer("GPTSentencePieceTokenizer", (path,), *(z if z >= 0 else None for z in ids))


def load_processor(path: Path):  # noqa: ANN201
    """A SentencePiece model.

    Raises:
        ValueError: it is none.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise ValueError(f"{path} is no SentencePiece model: {first_line(error)}.") from None
