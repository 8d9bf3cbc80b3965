"""A tokenizer that needs no training: a byte's id is its value, plus one end-of-document token."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_ID = 256
VOCAB_SIZE = 257


def encode_bytes(text: str) -> np.ndarray:
    """The ids of `text` (uint16): its UTF-8 bytes. Equal to what the written tokenizer gives."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)


def write_byte_tokenizer(folder: str | os.PathLike) -> Path:
    """Write the byte tokenizer as a Hugging Face tokenizer folder, or reuse the one already there.

    `transformers.AutoTokenizer.from_pretrained(folder)` loads it, and so does Megatron with
    `--tokenizer-type HuggingFaceTokenizer --tokenizer-model folder`. Text that happens to contain
    the letters of the end-of-document token is encoded as those letters, so that every text comes
    back exactly and no document can end another.

    Args:
        folder: where to write; its parent is created if need be.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something other than this tokenizer.
    """
    folder = Path(folder)
    if folder.exists():
        return _checked(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in _files().items():
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        return _checked(folder)  # another process wrote it first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _checked(folder: Path) -> Path:
    try:
        for name, content in _files().items():
            if json.loads((folder / name).read_text(encoding="utf-8")) != content:
                raise ValueError(name)
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{folder} exists but is not this byte tokenizer ({error}): "
            "move it away, or choose another folder"
        ) from error
    return folder


def tokenizer_file() -> dict[str, Any]:
    """What its tokenizer.json holds."""
    return _files()["tokenizer.json"]


def _files() -> dict[str, dict[str, Any]]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    vocabulary[END_OF_DOCUMENT] = END_OF_DOCUMENT_ID
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_OF_DOCUMENT_ID,
                "content": END_OF_DOCUMENT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    # A padding id lets Megatron fill a last, partial validation sample. It shares the eos id, so
    # Megatron pads with -1 and masks that, and warns about the sharing.
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": configuration}


def _byte_letters() -> list[str]:
    """The letter by which the Hugging Face ByteLevel format writes each byte: printable Latin-1
    characters stand for themselves, the other 68 bytes take the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
