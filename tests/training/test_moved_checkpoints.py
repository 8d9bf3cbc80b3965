"""A checkpoint is a folder that can be moved, its tokenizer with it; what the user names wins."""

import shutil
from argparse import Namespace

import pytest

from conversion.conversion_samples import convert, hf_folder
from megalodon_mcore.checkpoint_tokenizer import (
    keep_with_checkpoints,
    settle_arguments,
    tokenizer_of_checkpoint,
)
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from training.runs import MODEL, PRETRAIN, SCHEDULE, generate, launch, side_by_side

TEXT = ("--mock-data", "--tokenizer-type", "HuggingFaceTokenizer")
PROMPT = ("--prompt", "hé", "--tokens", "3", "--temperature", "0", "--ignore-end")


def tokenizer_of(folder, text):
    """A byte tokenizer that differs from others in its text alone."""
    write_byte_tokenizer(folder)
    (folder / "extra.txt").write_text(text)
    return folder


def pretrain(*arguments):
    return launch(*PRETRAIN, *map(str, arguments), *SCHEDULE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training checkpoint that was moved, and whose tokenizer is gone from where it was."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = write_byte_tokenizer(folder / "bytes")
    save = ("--save", folder / "before", "--save-interval", 3)
    result = pretrain(*MODEL, *TEXT, "--tokenizer-model", tokenizer, *save)
    assert result.returncode == 0, result.stdout[-3000:]
    shutil.rmtree(tokenizer)
    return (folder / "before").rename(folder / "after")


def test_a_moved_training_checkpoint_generates_resumes_and_converts(trained, tmp_path):
    load = ("--load", trained, "--use-checkpoint-args", "--ckpt-step", 3, "--mock-data")
    generated, resumed = generate(trained, *PROMPT), pretrain(*load)
    assert generated.returncode == 0, generated.stdout[-3000:]
    assert "hé" in generated.stdout
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    for given in (trained, trained / "iter_0000006"):
        made = tmp_path / given.name
        assert convert("mcore", "hf", given, made) == 0
        assert (made / "tokenizer.json").is_file()


def test_a_moved_conversion_generates_and_trains(tmp_path):
    """Also where something else now has its old name."""
    start = hf_folder(tmp_path / "start", "one-head", tokenizer=True)
    assert convert("hf", "mcore", start, tmp_path / "before") == 0
    moved = (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "before" / "tokenizer").mkdir(parents=True)
    load = ("--load", moved, "--use-checkpoint-args", "--mock-data")
    generated = generate(moved, *PROMPT)
    trained, named = side_by_side(
        lambda: pretrain(*load),
        lambda: pretrain(*load, "--tokenizer-model", moved / "tokenizer"),
    )
    for result in (generated, trained, named):
        assert result.returncode == 0, result.stdout[-3000:]


def test_generate_takes_another_tokenizer_and_says_where_one_is_missing(trained, tmp_path):
    lost = shutil.copytree(trained, tmp_path / "lost")
    (lost / "tokenizer").rename(tmp_path / "elsewhere")
    missing = generate(lost, *PROMPT)
    named = generate(lost, *PROMPT, "--tokenizer", tmp_path / "elsewhere")
    wrong = generate(lost, *PROMPT, "--tokenizer", tmp_path)
    assert missing.returncode == 2
    assert "give its place with --tokenizer." in missing.stdout
    assert named.returncode == 0, named.stdout[-3000:]
    assert wrong.returncode == 2 and "which holds no tokenizer" in wrong.stdout


def test_the_tokenizer_in_the_checkpoint_comes_before_the_recorded_place(tmp_path):
    save = tmp_path / "save"
    old, new = tokenizer_of(tmp_path / "old", "old"), tokenizer_of(tmp_path / "new", "new")
    assert tokenizer_of_checkpoint(save, "HuggingFaceTokenizer", str(old)) == old
    for tokenizer in (old, new, new):
        keep_with_checkpoints(save, tokenizer)
        place = tokenizer_of_checkpoint(save, "HuggingFaceTokenizer", str(old))
        assert place == save / "tokenizer"
        assert (place / "extra.txt").read_text() == tokenizer.name
    # Its own copy, named again, stays.
    keep_with_checkpoints(save, save / "tokenizer")
    assert (save / "tokenizer" / "extra.txt").read_text() == "new"
    assert [path.name for path in save.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("name", ["words.model", "tokenizer.model"])
def test_a_tokenizer_that_is_one_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"model")
    save, recorded = tmp_path / "save", str(tmp_path / name)
    keep_with_checkpoints(save, tmp_path / name)
    place = tokenizer_of_checkpoint(save, "GPTSentencePieceTokenizer", recorded)
    assert place == save / "tokenizer" / name and place.read_bytes() == b"model"


def test_what_the_user_names_wins(tmp_path):
    tokenizer_of(tmp_path / "tokenizer", "kept")
    recorded = dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="/gone")
    nothing = dict(tokenizer_type=None, tokenizer_model=None)

    def settled(written, load=tmp_path, **values):
        args = Namespace(load=str(load), **(recorded | values))
        settle_arguments(args, nothing | written, "--tokenizer-model")
        return args.tokenizer_type, args.tokenizer_model

    kind = "HuggingFaceTokenizer"
    assert settled({}) == (kind, str(tmp_path / "tokenizer"))
    assert settled({"tokenizer_model": "/mine"}) == (kind, "/mine")
    null = {"tokenizer_type": "NullTokenizer"}
    assert settled(null) == ("NullTokenizer", None)
    # A name that Hugging Face knows is no place.
    assert settled({}, tmp_path / "none", tokenizer_model="org/name") == (kind, "org/name")
    with pytest.raises(ValueError, match="neither in .*none/tokenizer nor where it was, /gone; "):
        settled({}, tmp_path / "none")
