"""Packed documents and conversations in the unmodified pretrain_gpt.py, as in `pretrain`."""

import pytest

from training.packed_samples import conversations, document_prefixes, marked_tokenizer
from training.runs import MODEL, SCHEDULE, save_to, scalars, train
from training.test_packed_data import (
    EVALUATION,
    LAYOUTS,
    MASKING,
    SHORT,
    assert_same,
    in_place_of,
)
from training.test_stock_script import CHECKOUT, POSITIONS, WITHOUT_APEX, pytestmark, script

__all__ = ["pytestmark"]

OWN = ("--megalodon-chunk-size", "16")
COMMON = (*MODEL, *SCHEDULE, *SHORT, "--hidden-dropout", "0", "--attention-dropout", "0")
STOCK = (*WITHOUT_APEX, *POSITIONS, "--spec", "megalodon_mcore.spec", "megalodon")
MASKED = ("--no-create-attention-mask-in-dataloader",)
# Its masks leave context-parallel ranks unequal numbers of tokens.
BY_TOKENS = ("--calculate-per-token-loss",)


def without_own(arguments):
    """Arguments that Megatron's own parser knows."""
    place = arguments.index(OWN[0])
    return (*arguments[:place], *arguments[place + len(OWN) :])


def stock(folder, arguments, processes=1):
    """Trains in the unmodified script with what `pretrain` was given."""
    return train(
        folder,
        *(*without_own(arguments), *STOCK),
        program=script(CHECKOUT),
        processes=processes,
        MEGALODON_CONFIG="chunk_size=16",
    )


@pytest.fixture(scope="module", params=["documents", "conversations"])
def run(request, tmp_path_factory):
    """Arguments of one kind of packed data, and what `pretrain` makes of them from a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "documents":
        (prefix,) = document_prefixes(folder, ("documents",))
        data = ("--data-path", prefix, "--split", "1,0,0", MASKING, "--eod-mask-loss")
        tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")
        tokenizer = (*tokenizer, str(folder / "byte_tokenizer"))
    else:
        data = ("--sft", "--train-data-path", conversations(folder / "conversations.jsonl"))
        tokenizer = ("--tokenizer-type", "SFTTokenizer", "--tokenizer-model")
        tokenizer = (*tokenizer, str(marked_tokenizer(folder)), *MASKED)
    arguments = (*COMMON, *data, *tokenizer, *BY_TOKENS)
    train(folder / "first", *arguments, *save_to(folder / "saved"), "--exit-interval", "1")
    arguments += ("--load", str(folder / "saved"), "--no-load-optim", "--no-load-rng")
    return arguments, train(folder / "run", *arguments)


LAYOUTS_OF_STOCK = {"one": (1, ()), **{name: LAYOUTS[name] for name in ("tensor", "context")}}
LAYOUTS_OF_STOCK["pipeline"] = LAYOUTS["pipeline"]
LAYOUTS_OF_STOCK["all"] = (8, LAYOUTS["all"][1])


@pytest.mark.parametrize("name", LAYOUTS_OF_STOCK)
def test_stock_script_trains_on_packed_data_like_our_own_pretrain(run, tmp_path, name):
    arguments, ours = run
    processes, options = LAYOUTS_OF_STOCK[name]
    assert_same(stock(tmp_path, (*arguments, *options), processes), ours)


def test_stock_script_evaluates_every_packed_row_like_our_own_pretrain(run, tmp_path):
    """Of conversations sets have one pack: of more Megatron takes the mean of packs' means."""
    arguments, _ = run
    if "--sft" in arguments:
        files = [conversations(tmp_path / f"{seed}.jsonl", 1, seed) for seed in (7, 9)]
        arguments = (*arguments, "--valid-data-path", *files, *EVALUATION)
    else:
        train_set, *sets = document_prefixes(tmp_path, ("train", "one", "two"))
        paths = ("--train-data-path", train_set, "--valid-data-path", *sets)
        arguments = (*in_place_of(arguments, "--data-path", 4, *paths), *EVALUATION)
    train(tmp_path / "ours", *arguments)
    stock(tmp_path / "theirs", arguments)
    for number in range(2):
        theirs, ours = (
            scalars(tmp_path / name, f"lm loss validation-{number}") for name in ("theirs", "ours")
        )
        assert list(theirs) == [2, 4]
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_stock_script_rearranges_documents_like_our_own_pretrain(tmp_path):
    tokenizer = str(marked_tokenizer(tmp_path))
    (prefix,) = document_prefixes(tmp_path, ("fim",))
    arguments = (*COMMON, "--data-path", prefix, "--split", "1,0,0", "--fim-data")
    arguments += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    train(tmp_path / "first", *arguments, *save_to(tmp_path / "saved"), "--exit-interval", "1")
    arguments += ("--load", str(tmp_path / "saved"), "--no-load-optim", "--no-load-rng")
    assert_same(stock(tmp_path / "theirs", arguments), train(tmp_path / "ours", *arguments))
