"""Values that no argument takes and arguments without effect, each refused in a sentence."""

import os
import sys
from unittest.mock import patch

import pytest

from megalodon_mcore import pretraining
from training.runs import PRETRAIN, RENDEZVOUS, TINY, launch

WRONG = {
    "--num-layers 0": "--num-layers is 0; it must be at least 1",
    "--ffn-hidden-size -8": "--ffn-hidden-size is -8; it must be at least 1",
    "--make-vocab-size-divisible-by 0": "--make-vocab-size-divisible-by is 0; it must be",
    "--micro-batch-size 0": "--micro-batch-size is 0; it must be at least 1",
    "--vocab-size -5": "--vocab-size is -5; it must be at least 1",
    "--train-iters -3": "--train-iters is -3; it must be at least 0",
    "--lr nan": "--lr is nan; it must be a finite number",
    "--lr -1": "--lr is -1.0; it must be at least 0",
    "--seed -1": "--seed is -1; it must be at least 0",
    "--num-workers -1": "--num-workers is -1",
    "--eval-interval -1": "--eval-interval is -1; it must be at least 0",
    "--eval-iters -1": "--eval-iters is -1; it must be at least 0",
    "--log-interval 0": "--log-interval is 0; it must be at least 1",
    "--hidden-dropout 2": "--hidden-dropout is 2.0; it must be below 1",
    "--attention-dropout -0.1": "--attention-dropout is -0.1; it must be at least 0",
    "--adam-beta1 1.5": "--adam-beta1 is 1.5; it must be below 1",
    "--norm-epsilon -1": "is -1.0; it must be above 0",
    "--recompute-granularity full": "needs --recompute-method uniform or block",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 0": (
        "--recompute-num-layers is 0; it must be at least 1"
    ),
    "--recompute-num-layers 1": "does nothing without --recompute-granularity",
    "--recompute-modules mlp": "does nothing without --recompute-granularity",
    "--async-save": "--async-save is given, which does nothing without --save",
    "--save-interval 2": "--save-interval is given, which does nothing without --save",
    "--save-retain-interval 2": "which does nothing without --save",
    "--ckpt-step 3": "--ckpt-step is given, which does nothing without --load",
    "--finetune": "--finetune is given, which does nothing without --load",
    "--first-last-layers-bf16": "does nothing without --fp8-format",
    "--fp8-margin 3": "does nothing without --fp8-format",
    "--megalodon-emulated-fp8-layers linear_fc1": "does nothing without --megalodon-emulated-fp8",
    "--dataloader-type external": "--dataloader-type is external",
    "--num-layers 3 --pipeline-model-parallel-size 2": "--num-layers is 3, which",
    # What Megatron checks without a word.
    "--hidden-size 65": "Megatron refuses these arguments: args.hidden_size % ",
    "--min-lr 1": "Megatron refuses these arguments: args.min_lr <= args.lr does not hold",
    "--lr-warmup-iters 10": "--lr-warmup-iters is 10, but the schedule has 6 iters in all",
    "--save place": "Megatron refuses these arguments: args.save_interval is not None does not",
}


def refusal(words, monkeypatch):
    """What SystemExit says of these words after TINY's."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *TINY, *map(str, words)])
    pretraining.stand_alone_environment()
    with pytest.raises(SystemExit) as raised:
        pretraining.run()
    message = str(raised.value)
    assert message.startswith("megalodon-mcore pretrain: ")
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    from megatron.training import global_vars

    from megalodon_mcore import cpu

    monkeypatch.chdir(tmp_path)
    # Transformers' Trainer would make a process group of what a run leaves in the environment.
    with patch.dict(os.environ):
        for name in RENDEZVOUS:
            os.environ.pop(name, None)
        stand_in = cpu.install()
        yield
        stand_in.undo()
    global_vars.destroy_global_vars()


@pytest.mark.parametrize("text", WRONG)
def test_pretrain_refuses(text, monkeypatch):
    assert WRONG[text] in refusal(text.split(), monkeypatch)


@pytest.mark.parametrize("option", ["--save", "--tensorboard-dir", "--data-cache-path"])
@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_is_no_place_to_write_to(option, below, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    message = refusal((option, tmp_path / "file" / below), monkeypatch)
    assert (
        f"{option} is {tmp_path / 'file' / below}, but {tmp_path / 'file'} is no folder" in message
    )


@pytest.mark.parametrize("what", ["nothing", "file", "folder"])
def test_load_needs_a_checkpoint(what, tmp_path, monkeypatch):
    if what == "file":
        (tmp_path / what).write_text("text")
    elif what == "folder":
        (tmp_path / what).mkdir()
        (tmp_path / what / "text_document.bin").write_text("text")
    message = refusal(("--load", tmp_path / what), monkeypatch)
    assert f"--load is {tmp_path / what}, which holds no checkpoint" in message


def test_sgd_cannot_be_resumed(tmp_path, monkeypatch):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    message = refusal(("--load", tmp_path, "--optimizer", "sgd"), monkeypatch)
    assert "--optimizer is sgd" in message and "--no-load-optim" in message


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path, monkeypatch):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    for step in (2, 4):
        (tmp_path / f"iter_{step:07d}").mkdir()
    message = refusal(("--load", tmp_path, "--ckpt-step", 3), monkeypatch)
    assert "--ckpt-step is 3, but" in message and "these iterations: 2, 4." in message


@pytest.mark.parametrize("text", ["not JSON", "[1]", '{"a": "b"}'])
def test_sequences_per_dataset(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text(text)
    message = refusal(("--per-dataset-sequences-path", tmp_path / "file"), monkeypatch)
    assert f"--per-dataset-sequences-path is {tmp_path / 'file'}, which " in message


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_training_with_a_sentence():
    """Without --save, where Megatron would save after it."""
    done = launch(*PRETRAIN, *TINY, "--lr", "1e30", "--train-iters", "20", "--clip-grad", "0")
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("megalodon-mcore pretrain: the loss of iteration ")
    assert "was no finite number" in last
