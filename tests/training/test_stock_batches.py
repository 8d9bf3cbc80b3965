"""What pretrain_gpt.py hands to Megatron's own GPT, and `pretrain` to Megalodon, of the same data.

They differ in one thing: `pretrain` gives no loss to targets that are another document's first
token, of which the document before says nothing.
"""

import json
from pathlib import Path

import pytest
import torch

from training import recorded_batches
from training.packed_samples import MARKS, conversations, document_prefixes, marked_tokenizer
from training.program_server import OF_THE_SERVER
from training.reserved_port import reserved_port
from training.runs import MODEL, SCHEDULE, launch, side_by_side
from training.test_packed_data import MASKING, SHORT, in_place_of
from training.test_stock_packed_data import MASKED, without_own
from training.test_stock_script import CHECKOUT, POSITIONS, WITHOUT_APEX, pytestmark

__all__ = ["pytestmark"]

COMMON = (*MODEL, *SCHEDULE, *SHORT)
# Two rows a micro-batch in one process, and one that context-parallel ranks share.
ROWS_BY_RANKS = {1: 2, 2: 1}


def documents(folder):
    """Arguments of short documents, and in which tensor which token says that one ends."""
    (prefix,) = document_prefixes(folder, ("documents",))
    tokenizer = folder / "byte_tokenizer"
    data = ("--data-path", prefix, "--split", "1,0,0", MASKING)
    data += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer))
    return data, ("tokens", token_of(tokenizer, "<|endoftext|>"))


def marked_conversations(folder):
    """As `documents`, in the format that gives every token a loss; each starts with a mark."""
    file, tokenizer = Path(conversations(folder / "conversations.jsonl")), marked_tokenizer(folder)
    start = '"role": "system", "content": "'
    file.write_text(file.read_text().replace(start, start + MARKS[0]))
    data = ("--sft", "--train-data-path", str(file), *MASKED)
    data += ("--sft-tokenizer-prompt-format", "identity", "--tokenizer-type", "SFTTokenizer")
    data += ("--tokenizer-model", str(tokenizer))
    return data, ("labels", token_of(tokenizer, MARKS[0]))


def token_of(tokenizer, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids(text)


KINDS = {"documents": (documents, "zigzag")}
KINDS["conversations"] = (marked_conversations, "document_zigzag")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Both programs' folders, and by what each kind's documents are known to end."""
    folder = tmp_path_factory.mktemp("recorded")
    ends, stock_jobs, own_jobs = {}, [], []
    for kind, (arguments_of, order) in KINDS.items():
        data, ends[kind] = arguments_of(folder)
        for ranks, rows in ROWS_BY_RANKS.items():
            arguments = (*COMMON, *data, "--context-parallel-size", str(ranks))
            arguments = in_place_of(arguments, "--micro-batch-size", 2)
            arguments += ("--micro-batch-size", str(rows))
            own = (*arguments, "--megalodon-sequence-order", order)
            own_jobs.append((new(folder / f"own {kind} {ranks}"), ranks, own))
            stock = (*without_own(arguments), *WITHOUT_APEX, *POSITIONS)
            stock_jobs.append((new(folder / f"stock {kind} {ranks}"), ranks, stock))
    script = str(Path(CHECKOUT) / "pretrain_gpt.py")
    side_by_side(lambda: record(script, stock_jobs), lambda: record("pretrain", own_jobs))
    return folder, ends


def new(folder):
    folder.mkdir()
    return str(folder)


def record(script, jobs):
    with reserved_port() as port:
        program = (recorded_batches.__file__, script, str(port), json.dumps(jobs))
        done = launch(*program, **OF_THE_SERVER)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("ranks", ROWS_BY_RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_megatrons_but_for_targets_in_another_document(recorded, kind, ranks):
    folder, ends = recorded
    name, end = ends[kind]
    across = 0
    for rank in range(ranks):
        theirs, ours = (
            torch.load(folder / f"{program} {kind} {ranks}" / f"{rank}.pt")
            for program in ("stock", "own")
        )
        assert len(theirs) == len(ours) == recorded_batches.MICRO_BATCHES
        for their, our in zip(theirs, ours, strict=True):
            is_across = their[name] == end
            across += (their["loss_mask"] * is_across).sum()
            their["loss_mask"] *= ~is_across
            assert is_same(our, their)
    assert across


def is_same(calls, others):
    return calls.keys() == others.keys() and all(
        torch.equal(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
        for key, value in calls.items()
    )
