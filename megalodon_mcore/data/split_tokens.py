"""Finds what training, validation and test have in datasets, before anything is built.

Megatron's GPTDataset repeats its documents until they make the samples that are asked for, of an
empty split for ever.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalodon_mcore.data.megatron_split import split_bounds, working_split

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

NAMES = ("training", "validation", "test")
PER_SPLIT_ARGUMENTS = ("--train-data-path", "--valid-data-path", "--test-data-path")


@dataclass(frozen=True)
class SplitData:
    """Datasets of one split: the argument that names them, and each one's tokens in it.

    Of conversations (--sft) it is their packs instead, each a sample.
    """

    argument: str
    prefixes: list[str]
    weighted: bool
    tokens: list[int]
    of_conversations: bool = False

    def samples(self, seq_length: int) -> list[int]:
        """Of each dataset, how many sequences of this length it makes."""
        if self.of_conversations:
            return self.tokens
        return [(tokens - 1) // seq_length for tokens in self.tokens]


class Conversations:
    """A file of packs of conversations, one a line."""

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            lines = [line for line in file if line.strip()]
        for line in lines[:1]:
            if not json.loads(line)["messages"]:
                raise ValueError("the first line has no messages")
        self.sequence_lengths = np.ones(len(lines), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequence_lengths)


def find_splits(args: Namespace) -> list[SplitData | None]:
    """Training, validation and test data as Megatron will take them; None for what has none.

    Raises:
        ValueError: a dataset is missing or a split of it is empty; one sentence names it.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return [SplitData("--mock-data", [], False, [])] * len(NAMES)
    blend, blends = get_blend_and_blend_per_split(args)
    if blend is not None:
        argument = "--data-path" if args.data_args_path is None else "--data-args-path"
        return _cut(argument, *blend, args.split, args.sft)
    if blends is None:
        raise ValueError(
            "Neither --data-path nor --train-data-path is given; take what prepare-data printed, "
            "or --mock-data."
        )
    if args.split is not None:
        raise ValueError(
            f"--split is {args.split}, but {' and '.join(PER_SPLIT_ARGUMENTS)} are divided "
            "already; leave it out."
        )
    common = args.per_split_data_args_path and "--per-split-data-args-path"
    return [
        None if of_split is None else _whole(common or argument, *of_split, args.sft)
        for argument, of_split in zip(PER_SPLIT_ARGUMENTS, blends, strict=True)
    ]


def _cut(
    argument: str, prefixes: list[str], weights: list[float] | None, split: str, sft: bool
) -> list[SplitData | None]:
    """The splits of datasets that --split divides."""
    found = {prefix: _open(argument, prefix, sft) for prefix in prefixes}
    found = {prefix: dataset for prefix, dataset in found.items() if dataset is not None}
    splits = []
    for place, name in enumerate(NAMES):
        if split_bounds(split, 1)[place] is None:
            splits.append(None)
            continue
        tokens = []
        for prefix, dataset in found.items():
            start, stop = split_bounds(split, len(dataset))[place]
            tokens.append(_count(dataset, start, stop))
            if not tokens[-1]:
                fewest = min(map(len, found.values()))
                raise ValueError(
                    f"--split is {split}, which leaves the {name} data none of the "
                    f"{len(dataset)} sequences of {prefix}; take --split {working_split(fewest)}."
                )
        splits.append(SplitData(argument, prefixes, weights is not None, tokens, sft))
    return splits


def _whole(argument: str, prefixes: list[str], weights: list[float] | None, sft: bool) -> SplitData:
    found = [_open(argument, prefix, sft) for prefix in prefixes]
    tokens = [_count(dataset, 0, len(dataset)) for dataset in found if dataset is not None]
    return SplitData(argument, prefixes, weights is not None, tokens, sft)


def _count(dataset: IndexedDataset | Conversations, start: int, stop: int) -> int:
    return int(np.sum(dataset.sequence_lengths[start:stop], dtype=np.int64))


def _open(argument: str, prefix: str, sft: bool) -> IndexedDataset | Conversations | None:
    """A dataset with tokens in it; None where another rank has to look."""
    if sft:
        return _open_conversations(argument, prefix)
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.object_storage_utils import is_object_storage_path

    if is_object_storage_path(prefix):
        return None
    missing = [f"{prefix}{end}" for end in (".idx", ".bin") if not Path(f"{prefix}{end}").is_file()]
    if missing and int(os.environ.get("RANK", "0")):
        return None  # ranks without data may run where there is none
    if missing:
        raise ValueError(
            f"{argument} names {prefix}, but {missing[0]} does not exist; give a prefix that "
            "prepare-data printed."
        )
    dataset = _read(IndexedDataset, argument, prefix)
    if not _count(dataset, 0, len(dataset)):
        raise ValueError(
            f"{argument} names {prefix}, which holds no tokens; leave it out or prepare it anew."
        )
    return dataset


def _open_conversations(argument: str, path: str) -> Conversations | None:
    if not Path(path).is_file() and int(os.environ.get("RANK", "0")):
        return None
    try:
        found = Conversations(path)
        if not len(found):
            raise ValueError("it is empty")
    except Exception as error:
        raise ValueError(
            f"{argument} names {path}, which --sft cannot read ({type(error).__name__}: {error}); "
            'it must be JSONL with a list "messages" of objects with role and content in each line.'
        ) from error
    return found


def _read(kind: type[IndexedDataset], argument: str, prefix: str) -> IndexedDataset:
    """A dataset whose files are whole."""
    data = Path(f"{prefix}.bin")
    try:
        # Of an empty file Megatron says less; of a damaged index anything.
        if not data.stat().st_size:
            raise ValueError(f"{data.name} is empty")
        dataset = kind(prefix)
        lengths, pointers = dataset.sequence_lengths, dataset.index.sequence_pointers
        size = int(np.max(pointers + lengths * np.dtype(dataset.index.dtype).itemsize, initial=0))
        if data.stat().st_size < size:
            raise ValueError(
                f"{data.name} has {data.stat().st_size} bytes, of which the index names {size}"
            )
    except Exception as error:
        raise ValueError(
            f"{argument} names {prefix}, which cannot be read ({type(error).__name__}: {error}); "
            "prepare it anew."
        ) from error
    return dataset
