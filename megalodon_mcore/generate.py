"""`megalodon-mcore generate`: continues a prompt from a checkpoint, printing as it goes."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalodon_mcore.data.end_token import tokenize_prompt
from megalodon_mcore.sampling import Sampler

BYTE_ORDER_MARK = "\ufeff"
REPLACEMENT = "\ufffd"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Folder that training had as --save."
    )
    parser.add_argument(
        "--iteration", type=int, help="Which checkpoint of the folder; the last one by default."
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="Folder or file of the tokenizer, if not the checkpoint's own.",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="Text to continue.")
    prompt.add_argument(
        "--prompt-file", type=Path, help="File with the text to continue; - for standard input."
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="How many tokens to generate, at most (256)."
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="Below 1 is more cautious, 0 always takes the likeliest token (1.0).",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="Sample among the k likeliest tokens; 0 is all (0)."
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample among the likeliest tokens that together have this probability (1.0).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same text (0).")
    parser.add_argument(
        "--ignore-end", action="store_true", help="Go on after an end-of-document token."
    )


def run(args: Namespace) -> int:
    """Generates to standard output; Megatron's own messages go to standard error.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: the checkpoint or the prompt file is missing.
    """
    from contextlib import redirect_stdout

    from megalodon_mcore.inference_model import load_model
    from megalodon_mcore.streaming import StreamingModel

    sampler = Sampler(args.temperature, args.top_k, args.top_p)
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; it takes a positive integer.")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed is {args.seed}; it takes an integer of 64 bits.")
    prompt = read_prompt(args)
    with redirect_stdout(sys.stderr):
        loaded = load_model(args.checkpoint, args.iteration, tokenizer=args.tokenizer)
    prompt_ids = tokenize_prompt(loaded.tokenizer, prompt)
    stream = generate_tokens(
        StreamingModel(loaded.model, loaded.arguments.megalodon_chunk_size),
        prompt_ids or [loaded.tokenizer.eod],
        args.tokens,
        sampler,
        vocab_size=loaded.tokenizer.vocab_size,
        seed=args.seed,
        stop_token=None if args.ignore_end else loaded.tokenizer.eod,
    )
    sys.stdout.write(prompt)
    for text in decode_stream(loaded.tokenizer, prompt_ids, stream):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def read_prompt(args: Namespace) -> str:
    """The prompt from the argument, the file or, when it is piped, standard input.

    Raises:
        ValueError: the file is no text.
        FileNotFoundError: there is none.
    """
    if args.prompt is not None:
        return args.prompt
    from_standard_input = str(args.prompt_file) == "-" or (
        args.prompt_file is None and not sys.stdin.isatty()
    )
    if from_standard_input:
        return sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
    if not args.prompt_file:
        return ""
    try:
        return args.prompt_file.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise ValueError(
            f"--prompt-file is {args.prompt_file}, which cannot be read as text: {error}."
        ) from None


def generate_tokens(
    model: Any,
    prompt_ids: list[int],
    max_tokens: int,
    sampler: Sampler,
    vocab_size: int,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yields tokens one by one; memory does not grow with their number.

    Args:
        model: a StreamingModel.
        prompt_ids: at least one token.
        max_tokens: how many to yield at most.
        sampler: picks each token from its logits.
        vocab_size: tokens the tokenizer knows; padding above it is never picked.
        seed: of the sampling.
        stop_token: ends the sequence and is not yielded.
    """
    device = next(model.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt_ids], dtype=torch.int64, device=device)
    state = None
    for _ in range(max_tokens):
        logits, state = model(tokens, state)
        token = sampler(logits[:, -1, :vocab_size], generator)
        if token.item() == stop_token:
            return
        yield int(token)
        tokens = token.view(1, 1)


def decode_stream(
    tokenizer: Any,
    prompt_ids: list[int],
    tokens: Iterator[int],
    window: int = 16,
) -> Iterator[str]:
    """Yields the text that each token adds, holding back characters that are not yet whole.

    Decodes a short window again and again, since tokens may merge with their neighbours. Only
    replacement marks at the end can still change: they may be the beginning of a character, of
    which up to three bytes, each one mark, come before the last.
    """
    shown, held = list(prompt_ids[-window:]), ""
    for token in tokens:
        before = tokenizer.detokenize(shown) if shown else ""
        shown.append(token)
        text = tokenizer.detokenize(shown)
        added = text[max(0, len(before) - len(held)) :]
        final = added.rstrip(REPLACEMENT)
        final = added[: max(len(final), len(added) - 3)]
        yield final
        held = added[len(final) :]
        shown = shown[-window:]
    yield held
