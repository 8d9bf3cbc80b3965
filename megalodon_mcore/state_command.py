"""`megalodon-mcore state`: reads a long text once and keeps what the model remembers of it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megalodon_mcore.generate import (
    CHECKPOINT_HELP,
    add_continuation_arguments,
    add_prompt_arguments,
    open_for,
    read_prompt,
    sampling_from,
    stream,
)
from megalodon_mcore.opened_checkpoint import add_checkpoint_arguments

PIECE = 16_384
"""Tokens between two looks at the progress."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    save = kinds.add_parser("save", help="Read a text and write the state after it.")
    add_checkpoint_arguments(save, CHECKPOINT_HELP)
    add_prompt_arguments(save, "Text to read.")
    save.add_argument("--out", type=Path, required=True, help="The file to make.")
    save.add_argument("--overwrite", action="store_true", help="Replace the file.")
    load = kinds.add_parser("load", help="Continue from a state, and a prompt behind it.")
    add_checkpoint_arguments(load, CHECKPOINT_HELP)
    load.add_argument("--state", type=Path, required=True, help="The file that `state save` made.")
    add_prompt_arguments(load, "What follows the text, such as a question; it may be empty.")
    add_continuation_arguments(load)


def run(args: Namespace) -> int:
    """Writes a state, or generates from one to standard output; messages go to standard error.

    Raises:
        ValueError: an argument is wrong, or a file is damaged or of another model.
        FileNotFoundError: the checkpoint, the prompt file or the state is missing.
        FileExistsError: --out exists.
    """
    return _save(args) if args.kind == "save" else _load(args)


def _save(args: Namespace) -> int:
    import torch
    from tqdm import tqdm

    from megalodon_mcore.hf import MegalodonCache
    from megalodon_mcore.hf.state_file import save_state

    if args.out.exists() and not (args.overwrite and args.out.is_file()):
        raise FileExistsError(f"--out is {args.out}, which exists; --overwrite replaces a file.")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out is {args.out}, but {args.out.parent} is no folder.")
    text = read_prompt(args)
    model, _, ids = open_for(args, text)
    if len(ids) < 2:
        raise ValueError(f"The text has {len(ids)} tokens; a state is of two or more.")
    tokens, cache = torch.tensor([ids], device=model.device), MegalodonCache(model.config)
    # The last one is what generation begins with.
    with torch.no_grad(), tqdm(total=len(ids) - 1, desc="reading", unit="token") as bar:
        for piece in tokens[:, :-1].split(PIECE, dim=1):
            model(piece, past_key_values=cache, logits_to_keep=1)
            bar.update(piece.shape[1])
    try:
        save_state(args.out, model, cache, tokens[:, -1:])
    except OSError as error:
        raise ValueError(f"--out is {args.out}, which cannot be written: {error}.") from None
    print(f"{len(ids):,} tokens read; {args.out} has {args.out.stat().st_size:,} bytes.")
    return 0


def _load(args: Namespace) -> int:
    from megalodon_mcore.hf.state_file import load_state

    sampling = sampling_from(args)
    prompt = read_prompt(args)
    model, tokenizer, ids = open_for(args, prompt)
    cache, next_tokens = load_state(args.state, model)
    if len(next_tokens) != 1:
        raise ValueError(
            f"--state is {args.state}, which has {len(next_tokens)} rows; `state load` goes on "
            "with one."
        )
    sys.stdout.write(prompt)
    stream(args, sampling, model, tokenizer, [*next_tokens[0].tolist(), *ids], cache)
    return 0
