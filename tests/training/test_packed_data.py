"""Documents and conversations packed into rows, through `pretrain`, in every layout."""

import pytest

from training.packed_samples import (
    conversations,
    document_prefixes,
    marked_tokenizer,
)
from training.runs import MODEL, SCHEDULE, save_to, scalars, train

PRETRAIN = ("-m", "megalodon_mcore", "pretrain")
MASKING = "--dataloader-inter-document-masking"
SHORT = ("--train-iters", "4")
TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
# As many padding rows in the vocabulary as a single process has.
PADDING = ("--make-vocab-size-divisible-by", "64")
LAYOUTS = {
    "tensor": (2, (*TENSOR, *PADDING)),
    "pipeline": (2, ("--pipeline-model-parallel-size", "2")),
    "context": (2, ("--context-parallel-size", "2")),
    "zigzag": (2, ("--context-parallel-size", "2", "--megalodon-sequence-order", "zigzag")),
    "data": (2, ()),
    "all": (
        8,
        (*TENSOR, *PADDING, "--pipeline-model-parallel-size", "2", "--context-parallel-size", "2"),
    ),
}
SLOW = {"data", "all"}


def layouts(*more):
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in (*LAYOUTS, *more)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def documents(folder):
    """Arguments that train on short documents, kept apart."""
    prefix, *_ = document_prefixes(folder, ("documents",))
    return (
        *(*MODEL, *SCHEDULE, *SHORT, "--data-path", prefix, "--split", "1,0,0", MASKING),
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(folder / "byte_tokenizer")),
    )


@pytest.fixture(scope="module")
def start(folder, documents):
    """Arguments that load a checkpoint, and the training of one process from it."""
    train(folder / "first", *documents, *save_to(folder / "checkpoint"), "--exit-interval", "1")
    load = ("--load", str(folder / "checkpoint"), "--no-load-optim", "--no-load-rng")
    return load, train(folder / "single", *documents, *load)


def assert_same(run, expected):
    assert list(run.losses) == list(expected.losses)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert run.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)


@pytest.mark.parametrize("name", layouts())
def test_documents_in_layouts_train_like_one_process(start, documents, tmp_path, name):
    processes, options = LAYOUTS[name]
    load, single = start
    assert_same(train(tmp_path, *documents, *load, *options, processes=processes), single)


@pytest.fixture(scope="module")
def sft(folder):
    """Arguments that train on conversations."""
    return (
        *(*MODEL, *SCHEDULE, *SHORT, "--sft", "--tokenizer-type", "SFTTokenizer"),
        *("--tokenizer-model", str(marked_tokenizer(folder))),
        *("--train-data-path", conversations(folder / "conversations.jsonl")),
    )


DOCUMENT_ZIGZAG = ("--context-parallel-size", "2", "--megalodon-sequence-order", "document_zigzag")
SFT_LAYOUTS = LAYOUTS | {"documents in zigzag": (2, DOCUMENT_ZIGZAG)}


@pytest.fixture(scope="module")
def sft_start(folder, sft):
    checkpoint = folder / "sft checkpoint"
    train(folder / "sft first", *sft, *save_to(checkpoint), "--exit-interval", "1")
    load = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    return load, train(folder / "sft single", *sft, *load)


@pytest.mark.parametrize("name", layouts("documents in zigzag"))
def test_conversations_in_layouts_train_like_one_process(sft_start, sft, tmp_path, name):
    processes, options = SFT_LAYOUTS[name]
    load, single = sft_start
    assert_same(train(tmp_path, *sft, *load, *options, processes=processes), single)


def evaluated(folder, name="lm loss validation"):
    return scalars(folder, name)


@pytest.mark.parametrize("layout", ["one", "context", "pipeline"])
def test_documents_are_evaluated_whole_and_by_the_way(start, documents, folder, tmp_path, layout):
    """Every sample of two sets, and of one at an interval."""
    processes, options = {"one": (1, ()), **LAYOUTS}[layout]
    prefixes = document_prefixes(folder, ("documents", "other"))
    arguments = [z for z in (*documents, *start[0], *options)]
    place = arguments.index("--data-path")
    arguments[place : place + 4] = [
        "--train-data-path",
        prefixes[0],
        "--valid-data-path",
        *prefixes,
    ]
    whole = ("--full-validation", "--multiple-validation-sets", "--eval-interval", "2")
    train(tmp_path, *arguments, *whole, processes=processes)
    found = [evaluated(tmp_path, f"lm loss validation-{place}") for place in range(2)]
    key = "evaluated"
    expected = EVALUATED.setdefault(key, found)
    for losses, wanted in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-5)


EVALUATED = {}
