"""Documents from text files, folders of them, and JSON lines."""

import codecs
import gzip
import json
import os
import re
import sysconfig
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

DEFAULT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz")
"""Files read in a folder. Not .json: a folder's .json files are mostly settings."""

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Files read as JSON lines; every other file is read as text."""

DOCUMENT_RULES = ("file", "paragraph", "line")
"""How a text file becomes documents."""

PYTHON_STDLIB = "python-stdlib"
"""The input name that stands for `python_stdlib_sources()`."""

_BLOCK = 1 << 20


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments that say which text is read."""
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
    add("--max-bytes", type=int, metavar="N", help="read only the first N bytes of text")


@dataclass(frozen=True)
class Document:
    """One document: its text, where it came from, and the bytes of input it used up."""

    text: str
    origin: str
    input_bytes: int


@dataclass(frozen=True)
class SourceFile:
    """A file to read; `named` if the user gave it by name rather than through a folder."""

    path: Path
    named: bool


def find_files(
    inputs: Iterable[str | os.PathLike], suffixes: Iterable[str] = DEFAULT_SUFFIXES
) -> list[SourceFile]:
    """The files behind the inputs, in the order in which they will be read.

    Args:
        inputs: files, folders (searched recursively in sorted order, hidden names left out), or
            the word "python-stdlib".
        suffixes: how the names of files in folders must end. Named files are always read.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: a folder has no such file, or one that is a link to nothing or a pipe.
        OSError: a folder cannot be read.
    """
    suffixes = tuple(suffixes)
    files: list[SourceFile] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = [SourceFile(file, named=False) for file in _walk(path, suffixes)]
            if not found:
                raise ValueError(
                    f"INPUT {str(name)!r} has no file ending in {' '.join(suffixes)}: "
                    "name another folder, or other endings with --suffixes"
                )
            files += found
        elif path.exists():
            files.append(SourceFile(path, named=True))
        elif str(name) == PYTHON_STDLIB:
            files += [SourceFile(file, named=False) for file in python_stdlib_sources()]
        else:
            raise FileNotFoundError(
                f"INPUT {str(name)!r} does not exist: give a text file, a .jsonl file, a folder "
                f"of them, or the word {PYTHON_STDLIB}"
            )
    return files


def python_stdlib_sources() -> list[Path]:
    """The .py files of the running Python's standard library, sorted, without tests, installed
    packages and the generated tables of encodings: some 10 MB of clean code for a first run."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    left_out |= {"encodings", "pydoc_data"}
    files = [
        file
        for file in _walk(root, (".py",))
        if left_out.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("_sysc")
    ]
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}: give another INPUT")
    return files


def iterate_documents(
    files: Iterable[SourceFile],
    documents: str = "file",
    json_key: str = "text",
    max_bytes: int | None = None,
    on_skip: Callable[[Path], None] | None = None,
) -> Iterator[Document]:
    """The documents of the files in order, without byte order marks; empty ones are left out.

    Args:
        files: what `find_files` returned.
        documents: what a document is in a text file: the whole "file", a "paragraph" (ended by
            blank lines) or a "line". JSON lines always hold one document each.
        json_key: the key under which a JSON line holds its text.
        max_bytes: stop after this many bytes of text, cutting the last document at a character.
        on_skip: called with each file of a folder that is left out because it is not UTF-8.

    Raises:
        ValueError: a named file is not UTF-8, or a JSON line is bad; the message names the line.
    """
    if documents not in DOCUMENT_RULES:
        raise ValueError(f"--documents {documents!r}: choose one of {', '.join(DOCUMENT_RULES)}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"--max-bytes {max_bytes}: must be 1 or more")
    left = max_bytes
    for file in files:
        if not file.named and not _is_utf8(file.path):
            if on_skip is not None:
                on_skip(file.path)
            continue
        for document in _undamaged(_read(file.path, documents, json_key, left), file.path):
            if left is not None:
                document = _shortened(document, left)
                left -= len(document.text.encode("utf-8"))
            if document.text:
                yield document
            if left is not None and left < 4:  # maybe no room for the next character
                return


def _undamaged(documents: Iterator[Document], path: Path) -> Iterator[Document]:
    try:
        yield from documents
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from None


def _read(path: Path, documents: str, json_key: str, limit: int | None) -> Iterator[Document]:
    with _open(path) as stream:
        if stream.peek(3)[:3] == codecs.BOM_UTF8:  # it says what the encoding is and is no text
            stream.read(3)
        if path.name.lower().endswith(JSON_SUFFIXES):
            yield from _read_json_lines(stream, path, json_key)
        elif documents == "file":
            data = stream.read(-1 if limit is None else limit)
            cut = limit is not None and len(data) == limit
            yield Document(_decoded(data, path, cut=cut), str(path), len(data))
        elif documents == "line":
            for number, line in enumerate(stream, 1):
                text = _decoded(line, path, number).removesuffix("\n").removesuffix("\r")
                yield Document(text, f"{path}:{number}", len(line))
        else:
            yield from _read_paragraphs(stream, path)


def _read_paragraphs(stream: BinaryIO, path: Path) -> Iterator[Document]:
    lines: list[str] = []
    start, size, number = 1, 0, 0
    for number, line in enumerate(stream, 1):
        text = _decoded(line, path, number)
        if not lines:
            start = number
        size += len(line)
        if text.strip():
            lines.append(text)
        elif lines:
            yield Document(re.sub(r"\r?\n\Z", "", "".join(lines)), f"{path}:{start}", size)
            lines, size = [], 0
    if lines:
        yield Document(re.sub(r"\r?\n\Z", "", "".join(lines)), f"{path}:{start}", size)


def _read_json_lines(stream: BinaryIO, path: Path, key: str) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        text = _decoded(line, path, number)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); the file must hold one complete "
                'JSON object a line, such as {"' + key + '": "..."}'
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            there = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
            raise ValueError(
                f"{path}, line {number}: no text under the key {key!r} (found: {there}); "
                "name the key that holds the text with --json-key"
            )
        try:
            record[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}, line {number}: the text holds half a surrogate pair ({error.reason} at "
                f"character {error.start}), which no text file can; mend or drop that line"
            ) from error
        yield Document(record[key], f"{path}:{number}", len(line))


def _open(path: Path) -> BinaryIO:
    file = gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")
    return cast(BinaryIO, file)


def _decoded(data: bytes, path: Path, line: int | None = None, cut: bool = False) -> str:
    """`data` as text. With `cut`, an incomplete character at the end is dropped."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data) if cut else data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}, line {line}" if line else f"{path}"
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start}: {error.reason}); convert it first, "
            f"for example with: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8"
        ) from error


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as stream:
            while block := stream.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _shortened(document: Document, limit: int) -> Document:
    data = document.text.encode("utf-8")
    if len(data) <= limit:
        return document
    return replace(document, text=data[:limit].decode("utf-8", errors="ignore"))


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                path = Path(folder, name)
                if not path.is_file():
                    what = "a link to nothing" if path.is_symlink() else "no file, such as a pipe"
                    raise ValueError(f"{path} is {what}: remove it, or name the files to read")
                yield path
