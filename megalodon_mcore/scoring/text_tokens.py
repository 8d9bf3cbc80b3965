"""A document's tokens and the bytes of text behind each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_mcore.conversion.json_file import read_object
from megalodon_mcore.conversion.model import Tokenizer
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER, load_processor, load_tokenizer
from megalodon_mcore.data.byte_tokenizer import encode_bytes, tokenizer_file


class DocumentTokenizer:
    """Tokenizes without the begin and end tokens that a tokenizer may add.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: the model's.

    Raises:
        ValueError: it does not say which characters a token stands for.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        if tokenizer.kind == NULL_TOKENIZER:
            self._encode = _numbers
            return
        if tokenizer.kind != "HuggingFaceTokenizer":
            self._own = load_processor(tokenizer.files[0])
            self._encode = self._by_sentencepiece
            return
        folder = tokenizer.files[0].parent
        self._own = load_tokenizer(folder)
        self._encode = self._by_hugging_face
        if _is_byte_tokenizer(folder, self._own):
            self._encode = _bytes
        elif not self._own.is_fast:
            raise ValueError(
                f"The tokenizer in {folder} does not say which characters a token stands for, by "
                "which bytes are counted; save it with a tokenizer.json."
            )

    def __call__(self, text: str, origin: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a document and, of each, the UTF-8 bytes it adds.

        Args:
            text: the document.
            origin: where it is from, for errors.

        Returns:
            int64 [tokens] and int64 [tokens], whose sum is that of the text's bytes.

        Raises:
            ValueError: the model does not have a token.
        """
        ids, ends = self._encode(text)
        ids, ends = np.asarray(ids, dtype=np.int64), np.asarray(ends, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = int(ids.max() if ids.max() >= self.vocab_size else ids.min())
            raise ValueError(
                f"{origin} has token {wrong}; the model has {self.vocab_size} of them."
            )
        if len(ids):
            # Bytes that no token stands for, such as spaces at the end, go with the last one.
            ends[-1] = len(text.encode("utf-8"))
        # Of several tokens of one character the first has its bytes.
        return ids, np.diff(np.maximum.accumulate(ends), prepend=0)

    def _by_hugging_face(self, text: str) -> tuple[list[int], np.ndarray]:
        made = self._own(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        stops = np.array([stop for _, stop in made["offset_mapping"]], dtype=np.int64)
        return made["input_ids"], _bytes_before(text)[stops]

    def _by_sentencepiece(self, text: str) -> tuple[list[int], np.ndarray]:
        # Newer and older versions' name; offsets are bytes in one and characters in the other.
        own = self._own
        encode = getattr(own, "encode_as_proto", None) or own.encode_as_immutable_proto
        pieces = list(encode(text).pieces)
        sizes = [len(piece.surface.encode("utf-8")) for piece in pieces]
        return [piece.id for piece in pieces], np.cumsum(sizes, dtype=np.int64)


def _is_byte_tokenizer(folder: Path, loaded: Any) -> bool:
    """Whether it is this package's, whose tokens of a long text take much less memory directly."""
    path = folder / "tokenizer.json"
    same = path.is_file() and read_object(path) == tokenizer_file()
    return same and loaded.split_special_tokens


def _bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = encode_bytes(text)
    return ids, np.arange(1, len(ids) + 1)


def _numbers(text: str) -> tuple[list[int], np.ndarray]:
    words = list(re.finditer(r"\S+", text))
    try:
        ids = [int(word[0]) for word in words]
    except ValueError as error:
        raise ValueError(
            f"The checkpoint has a tokenizer of numbers, and the text is none: {error}."
        ) from None
    return ids, _bytes_before(text)[np.array([word.end() for word in words], dtype=np.int64)]


def _bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character and after the last, int64 [characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
