"""`megalodon-mcore evaluate retrieval` and `retrieval-data`."""

from __future__ import annotations

import itertools
import json
import sys
from argparse import Namespace
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megalodon_mcore.scoring.causal_models import load_model
from megalodon_mcore.scoring.plots import plot_retrieval
from megalodon_mcore.scoring.retrieval import score_samples, table
from megalodon_mcore.scoring.retrieval_tasks import Sample, make_sample
from megalodon_mcore.scoring.run_folder import RunFolder
from megalodon_mcore.whole_file import write_whole


def _check_tasks(args: Namespace) -> list[tuple[str, int, float, int]]:
    """Each sample's task, length, depth and number."""
    for name, least in (("samples", 1), ("needles", 1), ("distractors", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; it takes at least {least}.")
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"--depths has {depth}; it takes numbers from 0 to 1.")
    for name in ("tasks", "lengths", "depths"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} is {values}; give each once.")
    numbers = range(args.samples)
    cells = list(itertools.product(args.tasks, args.lengths, args.depths, numbers))
    for task in args.tasks:
        # The shortest first, before any model is read.
        _sample(args, (task, min(args.lengths), args.depths[0], 0))
    return cells


def _sample(args: Namespace, cell: tuple[str, int, float, int]) -> Sample:
    return make_sample(*cell, args.seed, args.needles, args.distractors)


def evaluate_retrieval(args: Namespace) -> None:
    """Scores prompts, or goes on with them, and writes the folder.

    Raises:
        As command.run.
    """
    cells = _check_tasks(args)
    causal = load_model(args.checkpoint, args.iteration, args.tokenizer)
    names = ("tasks", "lengths", "depths", "samples", "seed", "needles", "distractors")
    identity = causal.identity | {name: getattr(args, name) for name in names}
    makers = [partial(_sample, args, cell) for cell in cells]
    progress = tqdm(total=len(cells), desc="Prompts", unit="", file=sys.stderr, dynamic_ncols=True)
    with closing(RunFolder(args.output, identity, args.overwrite, args.save_every)) as folder:
        with progress as bar:
            answers = score_samples(causal, makers, folder, bar.update)
        rows = table(cells, answers)
        right = sum(answer.right for answer in answers)
        folder.write_results({"run": identity, "accuracy": right / len(answers), "cells": rows})
        title = f"{args.checkpoint.absolute().name}: {right} of {len(answers)} answers are right"
        folder.write("retrieval.png", lambda path: plot_retrieval(rows, title, path))
    for task, length in itertools.product(args.tasks, args.lengths):
        own = [row for row in rows if (row["task"], row["length_bytes"]) == (task, length)]
        mean = sum(row["accuracy"] for row in own) / len(own)
        print(f"{task}, {length:,} bytes: {mean:.1%} right")
    print(f"Wrote {args.output}", file=sys.stderr)


def write_retrieval_data(args: Namespace) -> None:
    """Writes prompts as JSON lines.

    Raises:
        As command.run.
    """
    cells = _check_tasks(args)
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"--output is {args.output}, which exists; give --overwrite.")

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for cell in cells:
                file.write(json.dumps(_sample(args, cell)._asdict()) + "\n")

    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.output, write)
    except OSError as error:
        raise ValueError(
            f"--output is {args.output}, which cannot be written ({error}); choose another place."
        ) from None
    print(f"Wrote {len(cells)} prompts to {args.output}", file=sys.stderr)
