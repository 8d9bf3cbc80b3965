"""`megalodon-mcore evaluate`: losses on text by position, and retrieval over lengths and depths."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megalodon_mcore.data import sources
from megalodon_mcore.opened_checkpoint import add_checkpoint_arguments
from megalodon_mcore.scoring.retrieval_tasks import TASKS
from megalodon_mcore.scoring.windows import LONGER


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = kinds.add_parser("text", help="Loss, perplexity and bits per byte of text.")
    sources.add_arguments(text)
    _add_model(text)
    _add_output(text)
    text.add_argument(
        "--begin-token",
        type=int,
        help="Token that comes before each document and is not scored (the tokenizer's begin "
        "token or, without one, its end token).",
    )
    text.add_argument(
        "--states",
        choices=["reset", "carry"],
        default="reset",
        help="What crosses documents: nothing, or a Megalodon's state, in order (%(default)s).",
    )
    text.add_argument(
        "--context",
        type=int,
        help="The most tokens read at once (the model's max_position_embeddings; no bound for a "
        "Megalodon).",
    )
    text.add_argument(
        "--longer-documents",
        choices=LONGER,
        default="refuse",
        help="Than the context: refuse them, cut them and score their first tokens alone, or split "
        "them into windows, each read from nothing but the token before it (%(default)s).",
    )
    text.add_argument(
        "--tokens-per-step",
        type=int,
        default=2048,
        help="The most tokens of documents read side by side, and of a Megalodon's piece of a "
        "longer one (%(default)s).",
    )

    retrieval = kinds.add_parser(
        "retrieval", help="Whether the greedy continuation of long prompts is the answer."
    )
    _add_model(retrieval)
    _add_output(retrieval)
    _add_tasks(retrieval)
    data = kinds.add_parser(
        "retrieval-data", help="Write these prompts as JSON lines, for examples/lm_eval."
    )
    data.add_argument("--output", type=Path, required=True, help="The .jsonl file to make.")
    data.add_argument("--overwrite", action="store_true", help="Replace the file.")
    _add_tasks(data)


def _add_model(parser: ArgumentParser) -> None:
    add_checkpoint_arguments(
        parser,
        "Folder that training had as --save, a consolidated checkpoint of the released code, or a "
        "Hugging Face folder of any causal language model that transformers knows.",
    )


def _add_output(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Folder of results.json, the plot and the state; the same command again goes on from "
        "there.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Begin anew where there is a run.")
    parser.add_argument(
        "--save-every", type=float, default=30.0, help="Seconds between states (%(default)s)."
    )


def _add_tasks(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="Which ones (both)."
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 4096, 16384],
        help="Bytes of a prompt, so that they are the same for every tokenizer (1024 4096 16384).",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="Where what is asked for stands, from 0, the start, to 1 (0 0.25 0.5 0.75 1).",
    )
    parser.add_argument("--samples", type=int, default=10, help="Of each cell (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same prompts (0).")
    parser.add_argument(
        "--needles", type=int, default=1, help="Keys asked for; the first is at the depth (1)."
    )
    parser.add_argument("--distractors", type=int, default=0, help="Keys like them (0).")


def run(args: Namespace) -> int:
    """Evaluates; scores go to standard output and the folder, progress to standard error.

    Raises:
        ValueError: an argument is wrong, the checkpoint is damaged or a file cannot be used.
        FileNotFoundError: the checkpoint or an input is missing.
        FileExistsError: the output is something else.
    """
    from megalodon_mcore.scoring.retrieval_command import evaluate_retrieval, write_retrieval_data
    from megalodon_mcore.scoring.text_command import evaluate_text

    kinds = {
        "text": evaluate_text,
        "retrieval": evaluate_retrieval,
        "retrieval-data": write_retrieval_data,
    }
    if "save_every" in args and not 0 <= args.save_every < math.inf:
        raise ValueError(f"--save-every is {args.save_every}; it takes 0 seconds or more.")
    try:
        kinds[args.kind](args)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise ValueError(f"{error}.") from None
    return 0
