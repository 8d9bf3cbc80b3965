"""`megalodon-mcore generate`: continues a prompt from a checkpoint, printing as it goes."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megalodon_mcore.opened_checkpoint import (
    add_checkpoint_arguments,
    open_checkpoint,
    refuse_other_configuration,
    require_tokenizer,
)

if TYPE_CHECKING:
    from megalodon_mcore.hf import MegalodonCache, MegalodonForCausalLM

CHECKPOINT_HELP = (
    "Folder that training had as --save, a Hugging Face folder of this package's, or a "
    "consolidated checkpoint of the released code."
)
BYTE_ORDER_MARK = "\ufeff"
REPLACEMENT = "\ufffd"
PIECE = 1024
"""Tokens of one call of transformers' generate(), which copies all of a call's at each."""
COMPILED_FROM = 4096
"""Tokens from which compiling a step on a GPU takes less time than it saves."""
LEAST_TEMPERATURE = 1e-6
"""The value a lower one is taken for: it picks the likeliest, and nothing overflows."""
WINDOW = 16
"""Tokens that text is decoded again from, since they may merge with what follows."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_checkpoint_arguments(parser, CHECKPOINT_HELP)
    add_prompt_arguments(parser, "Text to continue.")
    add_continuation_arguments(parser)


def add_prompt_arguments(parser: ArgumentParser, help: str) -> None:
    """Adds --prompt, of which `help` says what it is, and --prompt-file."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help=help)
    prompt.add_argument("--prompt-file", type=Path, help="File with it; - for standard input.")


def add_continuation_arguments(parser: ArgumentParser) -> None:
    """Adds how many tokens are made, and how."""
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
    """Generates to standard output; messages go to standard error.

    Raises:
        ValueError: an argument is out of range, or the checkpoint is damaged.
        FileNotFoundError: the checkpoint or the prompt file is missing.
    """
    sampling = sampling_from(args)
    prompt = read_prompt(args)
    model, tokenizer, prompt_ids = open_for(args, prompt)
    if not prompt_ids:
        if tokenizer.eod is None:
            raise ValueError("The tokenizer has no end token to begin with; give a --prompt.")
        prompt_ids = [tokenizer.eod]
    sys.stdout.write(prompt)
    stream(args, sampling, model, tokenizer, prompt_ids)
    return 0


def sampling_from(args: Namespace) -> Sampling:
    """The options of a continuation, checked.

    Raises:
        ValueError: one is out of range.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    sampling.check()
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; it takes a positive integer.")
    return sampling


def open_for(args: Namespace, prompt: str) -> tuple[MegalodonForCausalLM, Any, list[int]]:
    """The checkpoint's model, on a GPU where there is one, its tokenizer, and a prompt's tokens.

    Raises:
        ValueError: the checkpoint is damaged, or the prompt has tokens that it does not know.
        FileNotFoundError: the checkpoint is missing.
    """
    from contextlib import redirect_stdout

    refuse_other_configuration()
    with redirect_stdout(sys.stderr):
        from megalodon_mcore.conversion.hf_model import hf_model
        from megalodon_mcore.conversion.text import TextTokenizer
        from megalodon_mcore.data.end_token import tokenize_prompt

        opened = open_checkpoint(args.checkpoint, args.iteration, args.tokenizer)
        tokenizer = TextTokenizer(require_tokenizer(opened.tokenizer, args.checkpoint))
        ids = tokenize_prompt(tokenizer, prompt)
        for token in ids:
            if not 0 <= token < opened.config.vocab_size:
                raise ValueError(
                    f"The prompt has token {token}; the model has {opened.config.vocab_size} of "
                    "them."
                )
        model = hf_model(opened, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, ids


def stream(
    args: Namespace,
    sampling: Sampling,
    model: MegalodonForCausalLM,
    tokenizer: Any,
    prompt_ids: list[int],
    cache: MegalodonCache | None = None,
) -> None:
    """Prints what follows at least one token, and what `cache` remembers, as it is made."""
    text = StreamedText(tokenizer, prompt_ids)

    def show(token: int) -> None:
        sys.stdout.write(text.add(token))
        sys.stdout.flush()

    stop = None if args.ignore_end else tokenizer.eod
    generate_tokens(model, prompt_ids, args.tokens, show, sampling, stop, cache)
    sys.stdout.write(text.held + "\n")


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


class Sampling(NamedTuple):
    """How tokens are picked: temperature, then top-k, then top-p, by the generator of a seed."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Looks at the values.

        Raises:
            ValueError: one is out of range.
        """
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}; it takes 0 or more.")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; it takes 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p is {self.top_p}; it takes a number above 0 up to 1.")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"--seed is {self.seed}; it takes an integer of 64 bits.")

    def options(self) -> dict[str, Any]:
        """transformers' names for them."""
        if self.temperature == 0.0:
            return {"do_sample": False}
        temperature = max(self.temperature, LEAST_TEMPERATURE)
        picked = {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True} | picked


def generate_tokens(
    model: MegalodonForCausalLM,
    prompt_ids: list[int],
    max_tokens: int,
    show: Callable[[int], None],
    sampling: Sampling,
    stop_token: int | None = None,
    cache: MegalodonCache | None = None,
) -> None:
    """Calls `show` with one token after the other.

    Memory does not grow with their number, but for attention layers' (`*`) keys and values.

    Args:
        model: the model.
        prompt_ids: at least one token.
        max_tokens: how many to show at most.
        show: is given each.
        sampling: picks them.
        stop_token: ends the sequence and is not shown.
        cache: what was read before.
    """
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    from megalodon_mcore.hf import MegalodonCache

    class Streamer(BaseStreamer):
        """Passes over what each call is given, which comes first."""

        given = True

        def put(self, value: torch.Tensor) -> None:
            """Shows a token."""
            if not self.given and (token := int(value)) != stop_token:
                show(token)
            self.given = False

        def end(self) -> None:
            """Ends a call."""
            self.given = True

    torch.manual_seed(sampling.seed)
    tokens = torch.tensor([prompt_ids], device=model.device)
    if cache is None:
        compiles = model.device.type == "cuda" and max_tokens >= COMPILED_FROM
        # Room that a graph's attention layers have for good; elsewhere theirs grows.
        room = len(prompt_ids) + max_tokens if compiles else None
        cache = MegalodonCache(model.config, is_compileable=compiles, max_length=room)
    if len(prompt_ids) > 1:
        with torch.no_grad():
            model(tokens[:, :-1], past_key_values=cache, logits_to_keep=1)
    last = tokens[:, -1:]
    while max_tokens:
        count = min(max_tokens, PIECE)
        cache.restart_count()
        config = GenerationConfig(
            max_new_tokens=count,
            eos_token_id=stop_token,
            pad_token_id=stop_token,
            **sampling.options(),
        )
        last = model.generate(
            last,
            attention_mask=torch.ones_like(last),
            past_key_values=cache,
            generation_config=config,
            streamer=Streamer(),
        )[:, -1:]
        max_tokens = 0 if int(last) == stop_token else max_tokens - count


class StreamedText:
    """The text that each token adds, holding back characters that are not yet whole.

    Decodes a short window again and again, since tokens may merge with their neighbours. Only
    replacement marks at the end can still change: they may be the beginning of a character, of
    which up to three bytes, each one mark, come before the last.

    Args:
        tokenizer: turns ids into text.
        prompt_ids: what comes before.
    """

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.shown, self.held = list(prompt_ids[-WINDOW:]), ""

    def add(self, token: int) -> str:
        """The text after this token that nothing changes any more; `held` is the rest."""
        before = self.tokenizer.detokenize(self.shown) if self.shown else ""
        self.shown.append(token)
        text = self.tokenizer.detokenize(self.shown)
        added = text[max(0, len(before) - len(self.held)) :]
        final = added.rstrip(REPLACEMENT)
        final = added[: max(len(final), len(added) - 3)]
        self.held = added[len(final) :]
        self.shown = self.shown[-WINDOW:]
        return final
