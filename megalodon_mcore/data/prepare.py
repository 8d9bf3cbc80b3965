"""Text in, datasets that Megatron trains on out."""

import os
import sys
import warnings
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megalodon_mcore.data.encoders import (
    BYTE,
    EncodedDocument,
    Encoder,
    choose_tokenizer,
    encode_documents,
)
from megalodon_mcore.data.indexed_writer import IndexedWriter, document_lengths, write_pieces
from megalodon_mcore.data.metadata import DatasetInfo, PreparedData
from megalodon_mcore.data.output_files import existing_outputs, publish, unfinished_folder
from megalodon_mcore.data.sentences import PunktSplitter, SentenceSplitter
from megalodon_mcore.data.sources import DEFAULT_SUFFIXES, find_files, iterate_documents
from megalodon_mcore.data.splitting import SPLIT_NAMES, parse_split, plan_split

BYTE_TOKENIZER_FOLDER = "byte_tokenizer"
"""The folder of the byte tokenizer, beside the datasets."""


def prepare_data(
    inputs: Sequence[str | os.PathLike],
    output_prefix: str | os.PathLike,
    *,
    tokenizer: str = BYTE,
    documents: str = "file",
    json_key: str = "text",
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    split: str | None = None,
    seed: int = 1234,
    split_sentences: bool = False,
    language: str = "english",
    keep_newlines: bool = False,
    sentence_splitter: SentenceSplitter | None = None,
    append_eod: bool = True,
    max_bytes: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Tokenize documents into Megatron indexed datasets.

    With `split` the datasets are PREFIX_train, PREFIX_valid and PREFIX_test; without, the one
    dataset has the name that Megatron's own tool would give it, PREFIX_<json_key>_document (or
    _sentence). PREFIX_meta.json, written last, describes them. Everything is first written to
    the folder PREFIX.unfinished, which a later run clears away should this one be killed.

    Args:
        inputs: text files, JSON-lines files, folders, or "python-stdlib".
        output_prefix: where the datasets go, without ending.
        tokenizer: "byte", a Hugging Face tokenizer folder, or a SentencePiece .model file.
        documents: what is a document in a text file: "file", "paragraph" or "line".
        json_key: the key of the text in JSON lines.
        suffixes: which files of a folder to read.
        split: shares of training, validation and test data, such as "0.9,0.05,0.05"; see
            `splitting.plan_split` for how documents are dealt out.
        seed: of the shuffle behind `split`.
        split_sentences: make each sentence a sequence of its document.
        language: whose sentence model to use.
        keep_newlines: keep the white space between sentences, which is dropped otherwise.
        sentence_splitter: a function from text to sentences, instead of NLTK's model. It must be
            picklable if `workers` is more than 1.
        append_eod: end every document with the tokenizer's end-of-document token.
        max_bytes: use only this many bytes of text, from the beginning of the inputs.
        workers: number of tokenizing processes; the output does not depend on it.
        overwrite: replace datasets that exist.
        progress: show progress bars on stderr.

    Returns:
        What was written, as in the sidecar.

    Raises:
        ValueError: an argument or a document is wrong; the message says which and what would do.
        FileExistsError: the output exists and `overwrite` is not set.
    """
    prefix = _checked_prefix(output_prefix)
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be 1 or more")
    shares = None if split is None else parse_split(split)
    names = _dataset_names(prefix, shares, json_key, split_sentences)
    old_files = existing_outputs(prefix, names)
    if old_files and not overwrite:
        raise FileExistsError(
            f"--output-prefix {str(output_prefix)!r}: {old_files[0]} exists; choose another "
            "prefix, or pass --overwrite to replace it"
        )
    if split_sentences and sentence_splitter is None:
        sentence_splitter = PunktSplitter(language, keep_newlines)
    files = find_files(inputs, suffixes)
    choice = choose_tokenizer(tokenizer, prefix.parent / BYTE_TOKENIZER_FOLDER)
    encoding = (choice, append_eod, sentence_splitter if split_sentences else None)
    # Megatron warns of missing optional packages and a missing rank; none matters here.
    with warnings.catch_warnings(action="ignore"):
        encoder = Encoder(*encoding)

    skipped: list[Path] = []
    source = iterate_documents(files, documents, json_key, max_bytes, skipped.append)
    total = _progress_total([file.path for file in files], max_bytes)
    with unfinished_folder(prefix) as folder:
        with _progress_bar(total, progress) as bar:
            encoded = encode_documents(source, encoder, workers, encoding)
            writer, text_bytes = _write_tokens(folder, encoded, encoder.vocab_size, bar)
        if not text_bytes:
            raise ValueError(
                f"INPUT {' '.join(map(repr, map(str, inputs)))}: no text found "
                f"({len(files)} files, {len(skipped)} of them not UTF-8); name files that hold text"
            )
        writer.finish(sum(text_bytes))
        if shares is None:
            infos, cut_documents = {"all": _renamed(writer, folder, names["all"])}, 0
        else:
            infos, cut_documents = _deal_out(
                folder, names, shares, seed, text_bytes, append_eod, writer.dtype, progress
            )
        for name, info in infos.items():
            info.prefix = str(prefix.parent / names[name])
        prepared = PreparedData(
            tokenizer_type=choice.tokenizer_type,
            tokenizer_model=str(choice.tokenizer_model),
            vocab_size=encoder.vocab_size,
            eod_id=encoder.eod_id,
            append_eod=append_eod,
            byte_level=choice.is_byte,
            sequence_level="sentence" if split_sentences else "document",
            dtype=np.dtype(writer.dtype).name,
            datasets=infos,
            split=shares,
            seed=None if shares is None else seed,
            cut_documents=cut_documents,
            skipped_files=len(skipped),
            inputs=[str(name) for name in inputs],
        )
        prepared.save(prefix, folder / "meta.json")
        publish(prefix, folder, list(names.values()), old_files)
    return prepared


def _checked_prefix(output_prefix: str | os.PathLike) -> Path:
    if os.fspath(output_prefix).endswith(os.sep):
        raise ValueError(
            f"--output-prefix {os.fspath(output_prefix)!r} is a folder: give a name in it as well, "
            f"such as {os.path.join(output_prefix, 'data')}"
        )
    return Path(os.path.abspath(output_prefix))


def _dataset_names(
    prefix: Path, shares: list[float] | None, json_key: str, split_sentences: bool
) -> dict[str, str]:
    """The datasets' file names without ending, by what they are: "all", or the splits."""
    if shares is None:
        level = "sentence" if split_sentences else "document"
        return {"all": f"{prefix.name}_{json_key}_{level}"}
    pairs = zip(SPLIT_NAMES, shares, strict=True)
    return {name: f"{prefix.name}_{name}" for name, share in pairs if share > 0}


def _progress_bar(total: int | None, progress: bool) -> tqdm:
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        desc="tokenizing",
        file=sys.stderr,
        disable=not progress,
    )


def _write_tokens(
    folder: Path, documents: Iterable[EncodedDocument], vocab_size: int, bar: tqdm
) -> tuple[IndexedWriter, array]:
    """All documents in one dataset, not yet finished, and the bytes of each one's text."""
    from megatron.core.datasets.indexed_dataset import DType

    text_bytes = array("q")
    writer = IndexedWriter(folder / "tokens", DType.optimal_dtype(vocab_size))
    for encoded in documents:
        bar.update(encoded.input_bytes)
        if encoded.sequence_lengths:
            writer.add(encoded.ids, encoded.sequence_lengths)
            text_bytes.append(encoded.text_bytes)
    return writer, text_bytes


def _deal_out(
    folder: Path,
    names: dict[str, str],
    shares: list[float],
    seed: int,
    text_bytes: array,
    append_eod: bool,
    dtype: type[np.number],
    progress: bool,
) -> tuple[dict[str, DatasetInfo], int]:
    """The splits of the dataset `tokens`, and how many documents were cut for them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with warnings.catch_warnings(action="ignore"):
        tokens = IndexedDataset(str(folder / "tokens"))
    lengths = document_lengths(tokens)
    splits = plan_split(lengths, shares, seed)
    cut = {p.document for ps in splits for p in ps if p.stop - p.start < lengths[p.document]}
    infos = {}
    for name, file_name in names.items():
        writer = IndexedWriter(folder / file_name, dtype)
        pieces = splits[SPLIT_NAMES.index(name)]
        infos[name] = write_pieces(writer, tokens, pieces, text_bytes, append_eod, progress)
    return infos, len(cut)


def _renamed(writer: IndexedWriter, folder: Path, name: str) -> DatasetInfo:
    for ending in (".bin", ".idx"):
        os.rename(folder / f"tokens{ending}", folder / f"{name}{ending}")
    return writer.info


def _progress_total(paths: list[Path], max_bytes: int | None) -> int | None:
    """Bytes to read, None if unknown because files are compressed."""
    if any(path.name.endswith(".gz") for path in paths):
        return max_bytes
    total = sum(path.stat().st_size for path in paths)
    return total if max_bytes is None else min(total, max_bytes)
