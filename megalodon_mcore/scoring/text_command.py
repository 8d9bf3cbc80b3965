"""`megalodon-mcore evaluate text`."""

from __future__ import annotations

import itertools
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_mcore.data.sources import (
    JSON_SUFFIXES,
    PYTHON_STDLIB,
    Document,
    SourceFile,
    find_files,
    iterate_documents,
)
from megalodon_mcore.scoring.causal_models import CausalModel, load_model
from megalodon_mcore.scoring.plots import plot_positions
from megalodon_mcore.scoring.run_folder import RunFolder
from megalodon_mcore.scoring.text_scores import TextScores
from megalodon_mcore.scoring.text_tokens import DocumentTokenizer
from megalodon_mcore.scoring.windows import windows

OPTIONS = ("documents", "json_key", "suffixes", "max_bytes", "states", "longer_documents")


def evaluate_text(args: Namespace) -> None:
    """Scores text, or goes on with it, and writes the folder.

    Raises:
        As command.run.
    """
    for name in ("context", "tokens_per_step"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}; it takes a positive integer.")
    files, skipped = find_files(args.inputs, args.suffixes), []
    documents = _documents(args, files, skipped)
    causal = load_model(args.checkpoint, args.iteration, args.tokenizer)
    context, begin = _context(args, causal), _begin_token(args, causal)
    tokenizer = DocumentTokenizer(causal.tokenizer, causal.vocab_size)
    identity = causal.identity | {
        "inputs": [z if z == PYTHON_STDLIB else str(Path(z).absolute()) for z in args.inputs],
        "begin token": begin,
        "context": context,
        "tokens-per-step": args.tokens_per_step,
    }
    identity |= {name.replace("_", "-"): getattr(args, name) for name in OPTIONS}
    progress = tqdm(
        total=_text_bytes(files, args.max_bytes),
        desc="Text",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
    )
    with closing(RunFolder(args.output, identity, args.overwrite, args.save_every)) as folder:
        with progress as bar:
            carry = args.states == "carry"
            run = TextScores(causal, folder, carry, args.tokens_per_step, bar.update)
            bar.update(sum(size for *_, size in run.documents))
            run.run(windows(documents, tokenizer, begin, context, args.longer_documents, run.after))
        if skipped:
            print(
                f"{len(skipped)} files of folders were left out because they are not UTF-8 text, "
                f"{skipped[0]} the first.",
                file=sys.stderr,
            )
        _write(args, folder, run.results())


def _write(args: Namespace, folder: RunFolder, results: dict[str, Any]) -> None:
    whole = results["whole"]
    if not whole["tokens"]:
        raise ValueError(
            f"INPUT {' '.join(args.inputs)} has text of which the tokenizer makes no token; name "
            "other files."
        )
    folder.write_results({"run": folder.identity} | results)
    title = f"{args.checkpoint.absolute().name}: {whole['bits_per_byte']:.4f} bits per byte"
    folder.write("positions.png", lambda path: plot_positions(results["positions"], title, path))
    print(
        f"{len(results['documents']):,} documents, {whole['tokens']:,} tokens, "
        f"{whole['bytes']:,} bytes: {whole['nats_per_token']:.6f} nats per token, perplexity "
        f"{whole['perplexity'] or math.inf:.4f}, {whole['bits_per_byte']:.6f} bits per byte"
    )
    print(f"Wrote {args.output}", file=sys.stderr)


def _documents(args: Namespace, files: list[SourceFile], skipped: list[Path]) -> Iterator[Document]:
    """The documents, of which there is one at least, so that without text nothing is made."""
    found = iterate_documents(files, args.documents, args.json_key, args.max_bytes, skipped.append)
    first = next(found, None)
    if first is None:
        raise ValueError(f"INPUT {' '.join(args.inputs)} has no text; name files that hold some.")
    return itertools.chain([first], found)


def _text_bytes(files: list[SourceFile], max_bytes: int | None) -> int | None:
    """The text's bytes, None where files have other things beside."""
    if any(file.path.name.endswith((*JSON_SUFFIXES, ".gz")) for file in files):
        return max_bytes
    total = sum(file.path.stat().st_size for file in files)
    return total if max_bytes is None else min(total, max_bytes)


def _context(args: Namespace, causal: CausalModel) -> int | None:
    kind = type(causal.model).__name__
    if args.context is not None and causal.context is not None and args.context > causal.context:
        raise ValueError(
            f"--context is {args.context}, and the {kind} reads {causal.context} at once; give at "
            "most that."
        )
    context = args.context or causal.context
    if args.longer_documents != "refuse" and context is None:
        raise ValueError(
            f"--longer-documents is {args.longer_documents}, but the {kind} reads documents of any "
            "length; give a --context or leave it out."
        )
    if args.states == "carry" and (context is not None or not causal.streams):
        why = f"--context is {context}" if causal.streams else f"the model is a {kind}"
        raise ValueError(
            f"--states is carry, which a Megalodon without --context can, but {why}; give reset."
        )
    return context


def _begin_token(args: Namespace, causal: CausalModel) -> int:
    own = causal.tokenizer
    begin = own.eos_token_id if own.bos_token_id is None else own.bos_token_id
    begin = begin if args.begin_token is None else args.begin_token
    if begin is None:
        raise ValueError(
            "The tokenizer has neither a begin nor an end token; give the number of one that comes "
            "before each document as --begin-token."
        )
    if not 0 <= begin < causal.vocab_size:
        raise ValueError(
            f"--begin-token is {begin}, and the model has tokens 0 to {causal.vocab_size - 1}."
        )
    return begin
