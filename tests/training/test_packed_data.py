"""Documents and conversations packed into rows, through `pretrain`, in every layout."""

import pytest

from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from training.packed_samples import (
    conversations,
    document_prefixes,
    marked_tokenizer,
)
from training.runs import MODEL, PRETRAIN, SCHEDULE, launch, save_to, scalars, train

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


def test_documents_with_megatrons_rope_train_alike(start, documents, tmp_path):
    """Megatron then makes angles as long as the longest document, which Megalodon ignores."""
    load, single = start
    run = train(tmp_path, *documents, *load, "--position-embedding-type", "rope")
    assert run.losses == single.losses


@pytest.mark.parametrize("name", layouts())
def test_documents_in_layouts_train_like_one_process(start, documents, tmp_path, name):
    processes, options = LAYOUTS[name]
    load, single = start
    assert_same(train(tmp_path, *documents, *load, *options, processes=processes), single)


@pytest.mark.slow
def test_documents_train_by_torchrun_like_one_process(start, documents, tmp_path):
    """The other layouts' ranks are forks; an environment that imports look at makes real ones."""
    processes, options = LAYOUTS["context"]
    load, single = start
    arguments = (*documents, *load, *options)
    run = train(tmp_path, *arguments, processes=processes, PYTHONHASHSEED="0")
    assert_same(run, single)


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


EVALUATION = ("--full-validation", "--multiple-validation-sets", "--eval-interval", "2")


def in_place_of(arguments, option, count, *others):
    """Arguments with others in the place of an option and those after it."""
    place = arguments.index(option)
    return (*arguments[:place], *others, *arguments[place + count :])


@pytest.fixture(scope="module")
def validation(folder, documents, sft):
    """Arguments that evaluate two sets of either kind whole, every second iteration."""
    prefixes = document_prefixes(folder, ("train",))
    # Every document is evaluated, twice.
    prefixes += document_prefixes(folder, ("one", "two"), documents=40)
    files = [conversations(folder / f"{seed}.jsonl", seed, seed) for seed in (7, 9)]
    paths = ("--train-data-path", prefixes[0], "--valid-data-path", *prefixes[1:])
    return {
        "documents": (*in_place_of(documents, "--data-path", 4, *paths), *EVALUATION),
        "conversations": (*sft, "--valid-data-path", *files, *EVALUATION),
    }


def losses_of_evaluations(folder, arguments, processes=1):
    train(folder, *arguments, processes=processes)
    return [scalars(folder, f"lm loss validation-{number}") for number in range(2)]


@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_layouts_evaluate_packed_rows_as_one_process(start, sft_start, validation, tmp_path, kind):
    load = (start if kind == "documents" else sft_start)[0]
    arguments = (*validation[kind], *load)
    single = losses_of_evaluations(tmp_path / "one", arguments)
    assert list(single[0]) == list(single[1]) == [2, 4]
    processes, options = LAYOUTS["context"]
    in_layout = losses_of_evaluations(tmp_path / "two", (*arguments, *options), processes)
    for found, expected in zip(in_layout, single, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_fim_trains_on_what_it_rearranges(folder, tmp_path):
    tokenizer = str(marked_tokenizer(folder))
    (prefix,) = document_prefixes(folder, ("fim",))
    arguments = (
        *(*MODEL, *SCHEDULE, *SHORT, "--data-path", prefix, "--split", "1,0,0"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer),
    )
    plain = train(tmp_path / "plain", *arguments)
    rearranged = train(tmp_path / "rearranged", *arguments, "--fim-data")
    assert list(rearranged.losses) == [1, 2, 3, 4]
    assert rearranged.losses != plain.losses
    missing = launch(*PRETRAIN, *arguments, "--fim-data", "--fim-pad-token", "<pad>")
    assert missing.returncode
    assert "--fim-pad-token is <pad>, which the tokenizer of --tokenizer-type" in missing.stdout


@pytest.mark.parametrize(
    ("prompt_format", "lacking"), [("identity", "padding token"), ("default", "chat template")]
)
def test_a_tokenizer_without_what_conversations_are_written_with(folder, prompt_format, lacking):
    tokenizer = str(write_byte_tokenizer(folder / "unmarked"))
    done = launch(
        *(*PRETRAIN, *MODEL, *SCHEDULE, *SHORT, "--sft", "--tokenizer-type", "SFTTokenizer"),
        *("--train-data-path", conversations(folder / "chats.jsonl")),
        *("--tokenizer-model", tokenizer, "--sft-tokenizer-prompt-format", prompt_format),
        "--no-create-attention-mask-in-dataloader",
    )
    assert done.returncode
    assert f"--sft-tokenizer-prompt-format is {prompt_format}, wh" in done.stdout
    assert lacking in done.stdout
