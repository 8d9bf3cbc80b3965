"""A tokenizer that needs no training: a byte's id is its value, plus one end-of-document token."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_mcore.conversion.json_file import write_object
from megalodon_mcore.conversion.new_folder import new_folder

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
    if not folder.exists():
        try:
            with new_folder(folder, None, overwrite=False) as temporary:
                for name, content in _files().items():
                    write_object(temporary / name, content)
            return folder
        except OSError:  # of another process that wrote it first
            if not folder.exists():
                raise
    try:
        for name, content in _files().items():
            if _plain(json.loads((folder / name).read_text(encoding="utf-8"))) != _plain(content):
                raise ValueError(name)
    except Exception as error:  # tokenizers has no type of its own
        raise FileExistsError(
            f"{folder} exists but is not this byte tokenizer ({error}): "
            "move it away, or choose another folder"
        ) from error
    return folder


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """A file's content, of tokenizer.json as the installed version of tokenizers writes it."""
    from tokenizers import Tokenizer

    if "model" not in content:
        return content
    return json.loads(Tokenizer.from_str(json.dumps(content)).to_str())


def tokenizer_file() -> dict[str, Any]:
    """What its tokenizer.json holds."""
    return _files()["tokenizer.json"]


def _files() -> dict[str, dict[str, Any]]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Of the format's letters for bytes, those that are a byte's own character stand for it.
    letters = {*pre_tokenizers.ByteLevel.alphabet()}
    others = iter(sorted(letters - {*map(chr, range(256))}))
    names = (chr(byte) if chr(byte) in letters else next(others) for byte in range(256))
    vocabulary = {letter: byte for byte, letter in enumerate(names)}
    vocabulary[END_OF_DOCUMENT] = END_OF_DOCUMENT_ID
    made = Tokenizer(models.BPE(vocabulary, []))
    options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END_OF_DOCUMENT])
    tokenizer = json.loads(made.to_str())
    # It decodes alike without; folders that are there have it.
    tokenizer["decoder"] |= options
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
