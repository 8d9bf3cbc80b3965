"""Turning documents into token ids, exactly as Megatron's tokenizers would."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.data.byte_tokenizer import (
    END_OF_DOCUMENT_ID,
    VOCAB_SIZE,
    encode_bytes,
    write_byte_tokenizer,
)
from megalodon_mcore.data.end_token import without_end
from megalodon_mcore.data.sentences import SentenceSplitter
from megalodon_mcore.data.sources import Document

BYTE = "byte"

_BATCH_CHARACTERS = 1 << 18
_BATCHES_IN_FLIGHT = 4


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer in the words of Megatron's --tokenizer-type and --tokenizer-model."""

    tokenizer_type: str
    tokenizer_model: Path
    is_byte: bool = False


@dataclass(frozen=True)
class EncodedDocument:
    """The ids of one document, the lengths of its sequences, and its size as text."""

    ids: np.ndarray
    sequence_lengths: list[int]
    text_bytes: int
    input_bytes: int


def choose_tokenizer(tokenizer: str, byte_folder: Path) -> TokenizerChoice:
    """Find the tokenizer that `--tokenizer` names.

    Args:
        tokenizer: "byte", a Hugging Face tokenizer folder, the tokenizer.json in one, or a
            SentencePiece .model file. Always something on this machine; nothing is downloaded.
        byte_folder: where the byte tokenizer is written if it is the one chosen.
    """
    if tokenizer == BYTE:
        return TokenizerChoice("HuggingFaceTokenizer", write_byte_tokenizer(byte_folder), True)
    path = Path(tokenizer)
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "tokenizer_config.json").exists():
            raise ValueError(
                f"--tokenizer {tokenizer!r}: {path} has no tokenizer_config.json, without which "
                "Megatron cannot load it; save the tokenizer with save_pretrained()"
            )
        return TokenizerChoice("HuggingFaceTokenizer", Path(os.path.abspath(path)))
    if path.is_file() and path.suffix == ".model":
        return TokenizerChoice("GPTSentencePieceTokenizer", Path(os.path.abspath(path)))
    raise ValueError(
        f"--tokenizer {tokenizer!r}: give the word {BYTE}, a Hugging Face tokenizer folder (or the "
        "tokenizer.json in it), or a SentencePiece .model file, on this machine"
    )


class Encoder:
    """Token ids of texts.

    Args:
        choice: the tokenizer.
        append_eod: end every document with the end-of-document token.
        splitter: splits documents into sentences, each a sequence of its own.

    Attributes:
        vocab_size: the number of ids.
        eod_id: the end-of-document id, None if the tokenizer has none.
    """

    def __init__(
        self, choice: TokenizerChoice, append_eod: bool, splitter: SentenceSplitter | None
    ) -> None:
        self.vocab_size: int
        self.eod_id: int | None
        self._encode: Callable[[str], np.ndarray | list[int]]
        if choice.is_byte:
            self.vocab_size, self.eod_id = VOCAB_SIZE, END_OF_DOCUMENT_ID
            self._encode = encode_bytes
        else:
            tokenizer = build_megatron_tokenizer(choice)
            self.vocab_size = tokenizer.vocab_size
            eod = tokenizer.eod
            self.eod_id = eod if eod is not None and eod >= 0 else None
            self._encode = tokenizer.tokenize
        if append_eod and self.eod_id is None:
            raise ValueError(
                f"--tokenizer {str(choice.tokenizer_model)!r} has no end-of-sequence token to end "
                "documents with: name its eos token (eos_token in tokenizer_config.json), or pass "
                "--no-append-eod"
            )
        self._name = str(choice.tokenizer_model)
        self._append_eod = append_eod
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        self._split = splitter

    def __call__(self, document: Document) -> EncodedDocument:
        """Encode one document. Sentences that give no token are left out, as in Megatron's tool."""
        texts = [document.text] if self._split is None else self._split(document.text)
        sequences = map(self._encode, texts)
        if self._append_eod:  # once, where the tokenizer or the text ends in the token already
            sequences = (without_end(sequence, self.eod_id) for sequence in sequences)
        sequences = [sequence for sequence in sequences if len(sequence)]
        lengths = [len(sequence) for sequence in sequences]
        ids = np.empty(sum(lengths) + self._append_eod, dtype=self._dtype)
        stop = 0
        for sequence in sequences:
            start, stop = stop, stop + len(sequence)
            try:
                ids[start:stop] = sequence
            except OverflowError:
                raise ValueError(
                    f"--tokenizer {self._name!r} makes the token {max(sequence)}, although it has "
                    f"{self.vocab_size}; repair it or choose another"
                ) from None
        if lengths and self._append_eod:
            ids[stop] = self.eod_id
            lengths[-1] += 1
        size = len(document.text.encode("utf-8"))
        return EncodedDocument(ids, lengths, size, document.input_bytes)


def build_megatron_tokenizer(choice: TokenizerChoice) -> Any:
    """The tokenizer that Megatron itself builds from the two arguments."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    defaults = SimpleNamespace(
        tokenizer_type=choice.tokenizer_type,
        tokenizer_model=str(choice.tokenizer_model),
        metadata_path=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        chat_template=None,
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        pad_vocab_size=False,
    )
    try:
        return build_tokenizer(defaults)
    except Exception as error:  # the loaders raise a type of their own each
        raise ValueError(
            f"--tokenizer {str(choice.tokenizer_model)!r}: Megatron's {choice.tokenizer_type} "
            f"cannot load it ({first_line(error)})"
        ) from error


def encode_documents(
    documents: Iterable[Document],
    encoder: Encoder,
    workers: int,
    worker_arguments: tuple[TokenizerChoice, bool, SentenceSplitter | None],
) -> Iterator[EncodedDocument]:
    """Encode documents in order, here or in worker processes; the result is the same.

    Args:
        documents: what to encode.
        encoder: used when `workers` is 1.
        workers: the number of processes; 1 means this one.
        worker_arguments: the arguments of `Encoder`, from which each worker builds its own.
    """
    if workers == 1:
        yield from map(encoder, documents)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # forking a process that holds threads may hang
        initializer=_start_worker,
        initargs=worker_arguments,
    )
    pending: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for batch in _batches(documents):
            pending.append(executor.submit(_encode_batch, batch))
            if len(pending) == _BATCHES_IN_FLIGHT * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            f"--workers {workers}: a worker process died (out of memory?); use fewer workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker_encoder: Encoder | None = None


def _start_worker(
    choice: TokenizerChoice, append_eod: bool, splitter: SentenceSplitter | None
) -> None:
    global _worker_encoder
    Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(choice, append_eod, splitter)


def _end_with_parent() -> None:
    """Leave when the parent is gone, even killed: a pool's workers would wait for ever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode_batch(batch: list[Document]) -> list[EncodedDocument]:
    return [_worker_encoder(document) for document in batch]
