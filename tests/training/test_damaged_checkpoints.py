"""A checkpoint that cannot be loaded is refused in one sentence, whoever meets it and how."""

import shutil

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from conversion.conversion_samples import convert, hf_folder
from megalodon_mcore.checkpoint_errors import CheckpointError, in_one_sentence
from training.runs import PRETRAIN, TINY, launch, save_to, side_by_side

ADVICE = "restore what is damaged from a copy or take another of the run's checkpoints."


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint whose files are whole, of its own iteration's folder."""
    folder = tmp_path_factory.mktemp("good")
    start = hf_folder(folder / "start", "one-head")
    assert convert("hf", "mcore", start, folder / "made") == 0
    return folder / "made" / "release"


def said_of(place, error):
    with pytest.raises(CheckpointError) as caught, in_one_sentence(place):
        raise error
    return str(caught.value)


ERRORS = {
    "a rank's": (
        CheckpointException("read", {3: (OSError("no such disk"), None)}),
        f"OSError: no such disk; {ADVICE}",
    ),
    "without words": (AssertionError(), f"AssertionError; {ADVICE}"),
    "of several lines": (ValueError("Bad bytes.\nThat may be..."), f"Bad bytes; {ADVICE}"),
    "an exit with status 0": (SystemExit(), f"Megatron has said why above; {ADVICE}"),
    "a missing tensor": (
        KeyError("a.weight"),
        "KeyError: 'a.weight'; give the arguments that it was trained with.",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_any_kind_is_one_sentence(good, kind):
    error, expected = ERRORS[kind]
    assert said_of(good, error) == f"{good} could not be loaded: {expected}"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("A sentence.")])
def test_what_needs_no_sentence_passes(good, error):
    with pytest.raises(type(error)) as caught, in_one_sentence(good):
        raise error
    assert caught.value is error


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def test_a_damaged_file_is_named_for_what_was_made_of_it(good, tmp_path):
    """By torch, that is: "Ran out of input"."""
    error = CheckpointException("read", {0: (EOFError("Ran out of input"), None)})
    for name, fault in {
        "__0_0.distcp": " is truncated: ",
        ".metadata": " is damaged: ",
        "metadata.json": " is no JSON: ",
    }.items():
        damaged = shutil.copytree(good, tmp_path / f"with {name}")
        cut(damaged / name)
        if name == "metadata.json":
            (damaged / name).write_text("{")
        sentence = said_of(damaged, error)
        assert sentence.startswith(f"{damaged / name}{fault}") and sentence.endswith(ADVICE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of checkpoints for each of Megatron's formats, of one training run each."""
    folder = tmp_path_factory.mktemp("trained")
    formats = ("torch_dist", "torch")
    results = side_by_side(
        *(
            lambda name=name: launch(
                *PRETRAIN, *TINY, *save_to(folder / name), "--ckpt-format", name
            )
            for name in formats
        )
    )
    for result in results:
        assert result.returncode == 0, result.stdout[-3000:]
    return folder


def last_line(result):
    return result.stdout.splitlines()[-1]


def test_pretrain_refuses_what_it_cannot_load(trained, tmp_path):
    damaged = {}
    for name, file in {
        "torch_dist": "__0_0.distcp",
        "torch": "mp_rank_00/model_optim_rng.pt",
    }.items():
        damaged[name] = shutil.copytree(trained / name, tmp_path / name)
        cut(damaged[name] / "iter_0000006" / file)
    cases = {
        (f"--load={damaged['torch_dist']}",): "__0_0.distcp is truncated: ",
        (f"--load={damaged['torch_dist']}", "--use-checkpoint-args"): "distcp is truncated: ",
        (f"--load={damaged['torch']}", "--ckpt-format=torch"): "Megatron has said why above; ",
        (f"--load={trained / 'torch_dist'}", "--ffn-hidden-size=64"): (
            "iter_0000006 could not be loaded: Global shape mismatch for loaded "
        ),
    }
    results = side_by_side(
        *(lambda extra=extra: launch(*PRETRAIN, *TINY, *extra) for extra in cases)
    )
    for result, expected in zip(results, cases.values(), strict=True):
        assert result.returncode == 1, result.stdout[-3000:]
        assert last_line(result).startswith("megalodon-mcore pretrain: /"), result.stdout[-3000:]
        assert expected in last_line(result) and "Traceback" not in result.stdout


def test_every_rank_of_pretrain_ends(trained, tmp_path):
    damaged = shutil.copytree(trained / "torch_dist", tmp_path / "damaged")
    cut(damaged / "iter_0000006" / "__0_0.distcp")
    result = launch(*PRETRAIN, *TINY, "--load", str(damaged), processes=2)
    assert result.returncode != 0
    assert "megalodon-mcore pretrain: /" in result.stdout
    assert "__0_0.distcp is truncated: " in result.stdout
