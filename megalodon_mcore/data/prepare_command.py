"""The command line of `megalodon-mcore prepare-data`."""

import argparse
import shlex
import time
from pathlib import Path

from megalodon_mcore.data import sources
from megalodon_mcore.data.encoders import BYTE
from megalodon_mcore.data.metadata import metadata_path
from megalodon_mcore.data.output_files import no_new_folder_on_failure
from megalodon_mcore.data.prepare import BYTE_TOKENIZER_FOLDER, prepare_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare-data` to a parser."""
    add = parser.add_argument
    sources.add_arguments(parser)
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
