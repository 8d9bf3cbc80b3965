"""`megalodon-mcore convert`: checkpoints between Megatron, Hugging Face and the released code."""

from __future__ import annotations

import errno
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from megalodon_mcore.conversion.first_line import first_line
from megalodon_mcore.conversion.hf_folder import open_hf, write_hf
from megalodon_mcore.conversion.mcore_checkpoint import open_mcore, write_mcore
from megalodon_mcore.conversion.megalodon_hf import PORT_DIFFERS, open_megalodon_hf
from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.conversion.new_folder import new_folder
from megalodon_mcore.conversion.released import open_released, write_released
from megalodon_mcore.conversion.tokenizers import open_tokenizer, tokenizer_vocab_size
from megalodon_mcore.parameters import Parameter

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

OPTIONS_OF_TARGETS = {
    "--max-shard-size": "hf",
    "--model-parallel-size": "released",
    "--make-vocab-size-divisible-by": "mcore",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        choices=["mcore", "hf", "released", "megalodon-hf"],
        help="What IN is: a folder that training had as --save, a Hugging Face folder, a "
        "consolidated checkpoint of the released code, or a folder of pszemraj/megalodon-hf.",
    )
    parser.add_argument(
        "--to", dest="target", required=True, choices=["mcore", "hf", "released"], help="Likewise."
    )
    parser.add_argument("input", metavar="IN", type=Path, help="Folder to read.")
    parser.add_argument("output", metavar="OUT", type=Path, help="Folder to make.")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="Type to write (IN's); CEMA, norms and the query/key affine are float32 in any case.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace OUT, if it is a checkpoint."
    )
    parser.add_argument("--max-shard-size", help="Largest file of a Hugging Face folder (5GB).")
    parser.add_argument(
        "--model-parallel-size",
        type=int,
        help="Ranks that a released checkpoint is cut for (1).",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        help="Pads the vocabulary of a Megatron checkpoint, as Megatron's argument does (128).",
    )
    parser.add_argument("--iteration", type=int, help="Which Megatron checkpoint; the last one.")
    parser.add_argument(
        "--tokenizer", type=Path, help="Folder or file of the tokenizer, if not where IN says."
    )
    parser.add_argument(
        "--vocab-size", type=int, help="Tokens without padding, if the tokenizer cannot tell."
    )


def run(args: Namespace) -> int:
    """Converts, showing progress on standard error.

    Raises:
        FileExistsError: OUT exists.
        FileNotFoundError: a file of IN is missing.
        ValueError: an argument is out of range, IN is damaged, or the disk is full.
    """
    for option, target in OPTIONS_OF_TARGETS.items():
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value is not None and args.target != target:
            raise ValueError(
                f"{option} is {value}, which goes with --to {target} alone; leave it out."
            )
    max_shard_size = parse_size(args.max_shard_size or "5GB")
    if not args.input.is_dir():
        raise FileNotFoundError(f"{args.input} is no folder.")
    try:
        with new_folder(args.output, args.input, args.overwrite) as folder:
            model = open_model(args)
            dtype = DTYPES[args.dtype] if args.dtype else model.dtype
            write = {
                "mcore": partial(
                    write_mcore,
                    final_folder=args.output,
                    divisible_by=_given(args.make_vocab_size_divisible_by, 128),
                ),
                "hf": partial(write_hf, max_shard_size=max_shard_size),
                "released": partial(write_released, ranks=_given(args.model_parallel_size, 1)),
            }[args.target]
            with _progress() as progress:
                write(model, folder, dtype, progress=progress)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else str(error)
        raise ValueError(f"{args.output} could not be written: {what}. Nothing is left.") from None
    for note in (PORT_DIFFERS if args.source == "megalodon-hf" else "", model.left_out):
        if note:
            print(f"Note: {note}", file=sys.stderr)
    print(f"Wrote {args.output}", file=sys.stderr)
    return 0


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def open_model(args: Namespace) -> OpenModel:
    """Opens IN.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it is damaged.
    """
    try:
        return _open(args)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # Bytes that changed can say anything.
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{args.input} is damaged ({what}).") from None


def _open(args: Namespace) -> OpenModel:
    if args.source == "mcore":
        return open_mcore(args.input, args.iteration, args.tokenizer, args.vocab_size)
    if args.iteration is not None or args.vocab_size is not None:
        raise ValueError("--iteration and --vocab-size go with --from mcore.")
    readers = {"hf": open_hf, "released": open_released, "megalodon-hf": open_megalodon_hf}
    model = readers[args.source](args.input)
    if args.tokenizer is not None:
        model.tokenizer = open_tokenizer(args.tokenizer)
        if model.tokenizer is None:
            raise ValueError(f"{args.tokenizer} holds no tokenizer.")
    size = tokenizer_vocab_size(model.tokenizer)
    if size is not None and size > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer in {args.tokenizer or args.input} has {size} tokens and the model "
            f"{model.config.vocab_size}; give the right one with --tokenizer."
        )
    return model


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a number.

    Raises:
        ValueError: it is none of these, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"--max-shard-size is {text!r}; it takes a size such as 5GB or 500MB.")
    return size


@contextmanager
def _progress() -> Iterator[Callable[[Iterable[Parameter]], Iterable[Parameter]]]:
    """Gives a wrapper of a loop that draws a bar on standard error.

    Its line is finished however the loop ends.
    """
    from tqdm import tqdm

    with ExitStack() as bars:
        yield lambda parameters: bars.enter_context(
            tqdm(parameters, desc="Tensors", unit="", file=sys.stderr, dynamic_ncols=True)
        )
