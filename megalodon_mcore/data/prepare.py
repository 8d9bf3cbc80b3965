"""`megalodon-mcore prepare-data`: text in, datasets that Megatron trains on out."""

import argparse
import fcntl
import os
import shutil
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from megalodon_mcore.data.encoders import (
    BYTE,
    Encoder,
    choose_tokenizer,
    encode_documents,
    quiet_megatron,
)
from megalodon_mcore.data.metadata import DatasetInfo, PreparedData, metadata_path
from megalodon_mcore.data.sentences import PunktSplitter, SentenceSplitter
from megalodon_mcore.data.sources import (
    DEFAULT_SUFFIXES,
    DOCUMENT_RULES,
    PYTHON_STDLIB,
    find_files,
    iterate_documents,
)
from megalodon_mcore.data.splitting import SPLIT_NAMES, Piece, parse_split, plan_split

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

BYTE_TOKENIZER_FOLDER = "byte_tokenizer"
"""The folder of the byte tokenizer, beside the datasets."""

_LONGEST_DOCUMENT = 2**31 - 1


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
    if os.fspath(output_prefix).endswith(os.sep):
        raise ValueError(
            f"--output-prefix {os.fspath(output_prefix)!r} is a folder: give a name in it as well, "
            f"such as {os.path.join(output_prefix, 'data')}"
        )
    prefix = Path(os.path.abspath(output_prefix))
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be 1 or more")
    shares = None if split is None else parse_split(split)
    if shares is None:
        level = "sentence" if split_sentences else "document"
        names = {"all": f"{prefix.name}_{json_key}_{level}"}
    else:
        names = {
            name: f"{prefix.name}_{name}"
            for name, share in zip(SPLIT_NAMES, shares, strict=True)
            if share > 0
        }
    old_files = _existing_outputs(prefix, names)
    if old_files and not overwrite:
        raise FileExistsError(
            f"--output-prefix {str(output_prefix)!r}: {old_files[0]} exists; choose another "
            "prefix, or pass --overwrite to replace it"
        )
    if split_sentences and sentence_splitter is None:
        sentence_splitter = PunktSplitter(language, keep_newlines)
    files = find_files(inputs, suffixes)

    choice = choose_tokenizer(tokenizer, prefix.parent / BYTE_TOKENIZER_FOLDER)
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

        splitter = sentence_splitter if split_sentences else None
        encoder = Encoder(choice, append_eod, splitter)
    dtype = DType.optimal_dtype(encoder.vocab_size)

    skipped: list[Path] = []
    source = iterate_documents(files, documents, json_key, max_bytes, skipped.append)
    with _unfinished_folder(prefix) as folder:
        with tqdm(
            total=_progress_total([file.path for file in files], max_bytes),
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            desc="tokenizing",
            file=sys.stderr,
            disable=not progress,
        ) as bar:
            worker_arguments = (choice, append_eod, splitter)
            text_bytes = array("q")
            writer = _Writer(folder / "tokens", dtype)
            for encoded in encode_documents(source, encoder, workers, worker_arguments):
                bar.update(encoded.input_bytes)
                if encoded.sequence_lengths:
                    writer.add(encoded.ids, encoded.sequence_lengths)
                    text_bytes.append(encoded.text_bytes)
        if not text_bytes:
            raise ValueError(
                f"INPUT {' '.join(map(repr, map(str, inputs)))}: no text found "
                f"({len(files)} files, {len(skipped)} of them not UTF-8); name files that hold text"
            )
        writer.finish(sum(text_bytes))

        if shares is None:
            infos = {"all": _renamed(writer, folder, names["all"])}
            cut_documents = 0
        else:
            with quiet_megatron():
                tokens = IndexedDataset(str(folder / "tokens"))
            lengths = _document_lengths(tokens)
            splits = plan_split(lengths, shares, seed)
            cut_documents = len(
                {p.document for ps in splits for p in ps if p.stop - p.start < lengths[p.document]}
            )
            infos = {
                name: _write_pieces(
                    _Writer(folder / names[name], dtype),
                    tokens,
                    splits[SPLIT_NAMES.index(name)],
                    text_bytes,
                    append_eod,
                    progress,
                )
                for name in names
            }
            del tokens  # closes its memory maps
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
            dtype=np.dtype(dtype).name,
            datasets=infos,
            split=shares,
            seed=None if shares is None else seed,
            cut_documents=cut_documents,
            skipped_files=len(skipped),
            inputs=[str(name) for name in inputs],
        )
        prepared.save(prefix, folder / "meta.json")
        _publish(prefix, folder, list(names.values()), old_files)
    return prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare-data` to a parser."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text to read: text files; .jsonl, .json or .jsonl.gz files with one JSON object a "
        f"line; folders of such files; or the word {PYTHON_STDLIB} for the source code of this "
        "Python's standard library, about 10 MB to try things with",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="where to write, for example data/books; the files written begin with this",
    )
    add(
        "--tokenizer",
        default=BYTE,
        metavar="byte|PATH",
        help="byte (the default) makes every byte of the text a token and needs no training; or a "
        "Hugging Face tokenizer folder on this machine, or a SentencePiece .model file",
    )
    add(
        "--documents",
        choices=DOCUMENT_RULES,
        default="file",
        help="what one document is in a text file: the whole file (default), a paragraph (blank "
        "lines between), or a line; JSON lines are always one document each",
    )
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="the key that holds the text in JSON files (default: %(default)s)",
    )
    add(
        "--suffixes",
        nargs="+",
        default=list(DEFAULT_SUFFIXES),
        metavar="SUFFIX",
        help=f"which files of a folder to read (default: {' '.join(DEFAULT_SUFFIXES)})",
    )
    add(
        "--split",
        metavar="TRAIN,VALID,TEST",
        help="deal the documents out to a training, a validation and a test dataset by these "
        "shares, for example 0.9,0.05,0.05; without it one dataset holds everything, and "
        "Megatron's own --split divides it when training",
    )
    add(
        "--seed",
        type=int,
        default=1234,
        help="of the shuffle that deals the documents out (default: %(default)s)",
    )
    add(
        "--split-sentences",
        action="store_true",
        help="make every sentence a sequence of its own, as models such as BERT need; found with "
        "NLTK's punkt_tab models, which must be installed",
    )
    add(
        "--language",
        default="english",
        help="the language of the sentence model (default: %(default)s)",
    )
    add(
        "--keep-newlines",
        action="store_true",
        help="with --split-sentences: keep the white space between sentences (otherwise dropped)",
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (on by default)",
    )
    add(
        "--max-bytes",
        type=int,
        metavar="N",
        help="read only the first N bytes of text",
    )
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes to tokenize with (default: %(default)s, which is best for the byte "
        "tokenizer); the output is the same for any number",
    )
    add("--overwrite", action="store_true", help="replace the output if it exists")


def run(args: argparse.Namespace) -> int:
    """Run `prepare-data` with parsed arguments; returns the exit status."""
    started = time.monotonic()
    names = (
        "tokenizer documents json_key suffixes split seed split_sentences language keep_newlines "
        "append_eod max_bytes workers overwrite"
    ).split()
    try:
        with _no_new_folder_on_failure(Path(args.output_prefix).parent / BYTE_TOKENIZER_FOLDER):
            prepared = prepare_data(
                args.inputs, args.output_prefix, **{name: getattr(args, name) for name in names}
            )
    except (ValueError, OSError, EOFError) as error:
        print(f"megalodon-mcore prepare-data: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    for name, info in prepared.datasets.items():
        print(
            f"{name}: {info.documents:,} documents, {info.tokens:,} tokens, {info.bytes:,} bytes "
            f"in {info.prefix}.bin and .idx"
        )
    if prepared.cut_documents:
        print(
            f"{prepared.cut_documents} long documents were cut, so that every split gets its share"
        )
    if prepared.skipped_files:
        print(f"{prepared.skipped_files} files were skipped because they are not UTF-8 text")
    print(f"described in {metadata_path(args.output_prefix)}; took {seconds:.1f} s")
    print("\nTo train on this with Megatron, pass:\n" + prepared.megatron_command_line())
    return 0


class _Writer:
    """Writes one indexed dataset and counts what goes in."""

    def __init__(self, prefix: Path, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self.info = DatasetInfo(str(prefix), documents=0, sequences=0, tokens=0, bytes=0)

    def add(self, ids: np.ndarray, sequence_lengths: list[int]) -> None:
        if len(ids) > _LONGEST_DOCUMENT:
            raise ValueError(
                f"a document of {len(ids):,} tokens is longer than Megatron's format allows "
                f"({_LONGEST_DOCUMENT:,}); divide it with --documents paragraph or line"
            )
        self._builder.add_document(ids, sequence_lengths)
        self.info.documents += 1
        self.info.sequences += len(sequence_lengths)
        self.info.tokens += len(ids)

    def finish(self, text_bytes: int) -> DatasetInfo:
        self._builder.finalize(f"{self._prefix}.idx")
        self.info.bytes = text_bytes
        return self.info


def _write_pieces(
    writer: _Writer,
    tokens: "IndexedDataset",
    pieces: list[Piece],
    text_bytes: Sequence[int],
    append_eod: bool,
    progress: bool,
) -> DatasetInfo:
    """Copy pieces of documents. A piece cut off before the end of its document gets no
    end-of-document token, and its share of the document's bytes goes by tokens."""
    total_bytes = 0
    flat = np.asarray(np.memmap(f"{tokens.path_prefix}.bin", tokens.index.dtype, mode="r"))
    starts = np.concatenate([[0], np.cumsum(tokens.sequence_lengths, dtype=np.int64)])
    bounds = tokens.document_indices
    name = Path(writer.info.prefix).name
    for piece in tqdm(pieces, desc=f"writing {name}", file=sys.stderr, disable=not progress):
        ends = starts[bounds[piece.document] : bounds[piece.document + 1] + 1]
        first, last = int(ends[0]), int(ends[-1])
        lengths = [piece.stop - piece.start]
        if len(ends) > 2:  # several sequences
            lengths = np.diff((ends - first).clip(piece.start, piece.stop))
            lengths = lengths[lengths > 0].tolist()
        writer.add(flat[first + piece.start : first + piece.stop], lengths)
        content = max(last - first - append_eod, 1)
        size = text_bytes[piece.document]
        total_bytes += size * min(piece.stop, content) // content
        total_bytes -= size * min(piece.start, content) // content
    return writer.finish(total_bytes)


def _renamed(writer: _Writer, folder: Path, name: str) -> DatasetInfo:
    for ending in (".bin", ".idx"):
        os.rename(folder / f"tokens{ending}", folder / f"{name}{ending}")
    return writer.info


def _document_lengths(tokens: "IndexedDataset") -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(tokens.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[tokens.document_indices])


def _progress_total(paths: list[Path], max_bytes: int | None) -> int | None:
    """Bytes to read, None if unknown because files are compressed."""
    if any(path.name.endswith(".gz") for path in paths):
        return max_bytes
    total = sum(path.stat().st_size for path in paths)
    return total if max_bytes is None else min(total, max_bytes)


def _existing_outputs(prefix: Path, names: dict[str, str]) -> list[Path]:
    """The files that writing these datasets would replace, or leave behind from an earlier run."""
    stems = [prefix.parent / name for name in names.values()]
    sidecar = metadata_path(prefix)
    if sidecar.exists():
        try:
            stems += [Path(info.prefix) for info in PreparedData.load(prefix).datasets.values()]
        except (ValueError, TypeError, KeyError):
            pass  # a damaged sidecar is replaced as well
    files = [sidecar, *(Path(f"{stem}{ending}") for stem in stems for ending in (".idx", ".bin"))]
    return [file for file in dict.fromkeys(files) if file.exists()]


@contextmanager
def _no_new_folder_on_failure(folder: Path) -> Iterator[None]:
    """Removes the folder if it is new and alone: another run may use it that writes beside it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.exists() and list(folder.parent.iterdir()) == [folder]:
            shutil.rmtree(folder)
        raise


@contextmanager
def _unfinished_folder(prefix: Path) -> Iterator[Path]:
    """The folder PREFIX.unfinished, empty, held by this process alone, and gone afterwards."""
    folder = prefix.parent / f"{prefix.name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed run holds no lock
        except BlockingIOError as error:
            raise FileExistsError(
                f"--output-prefix {str(prefix)!r}: another run is writing it just now; "
                "wait for it, or choose another prefix"
            ) from error
        try:
            for leftover in folder.iterdir():
                if leftover.name != "lock":
                    leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder)


def _publish(prefix: Path, folder: Path, names: list[str], old_files: list[Path]) -> None:
    """Move finished files into place: the data, then the indices, then the sidecar, so that at no
    moment does anything half-written look finished."""
    new = [f"{name}{ending}" for ending in (".bin", ".idx") for name in names]
    for name in [*new, "meta.json"]:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    for old in old_files:  # the sidecar comes first
        old.unlink()
    for name in new:
        os.rename(folder / name, prefix.parent / name)
    os.rename(folder / "meta.json", metadata_path(prefix))
