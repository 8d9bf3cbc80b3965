"""The command line of `megalodon-mcore prepare-data`."""

import argparse
import shlex
import time
from pathlib import Path

from megalodon_mcore.data.encoders import BYTE
from megalodon_mcore.data.metadata import metadata_path
from megalodon_mcore.data.output_files import no_new_folder_on_failure
from megalodon_mcore.data.prepare import BYTE_TOKENIZER_FOLDER, prepare_data
from megalodon_mcore.data.sources import DEFAULT_SUFFIXES, DOCUMENT_RULES, PYTHON_STDLIB


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
    with no_new_folder_on_failure(Path(args.output_prefix).parent / BYTE_TOKENIZER_FOLDER):
        prepared = prepare_data(
            args.inputs, args.output_prefix, **{name: getattr(args, name) for name in names}
        )
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
    print("\nTo train on this with Megatron, pass:\n" + shlex.join(prepared.megatron_arguments()))
    return 0
