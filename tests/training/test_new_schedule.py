"""A resumed run may take another learning rate, weight decay or warm-up, if it says so."""

import pytest

from training.runs import TINY, launch, save_to, scalars, side_by_side, train

NEW_RATE = ("--lr", "5e-4", "--min-lr", "1e-5")
OVERRIDE, KEEP = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
OPTIMIZERS = {"plain": (), "distributed": ("--use-distributed-optimizer",)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_learning_rate_on_resume(tmp_path, name):
    common = (*TINY, *OPTIMIZERS[name])
    saved = tmp_path / "saved"
    train(tmp_path / "first", *common, *save_to(saved), "--exit-interval", "3")

    def resume(folder, *options):
        return train(tmp_path / folder, *common, "--load", str(saved), *options)

    same, new, kept, silent = side_by_side(
        lambda: resume("same"),
        lambda: resume("new", *NEW_RATE, OVERRIDE),
        lambda: resume("kept", *NEW_RATE, KEEP),
        lambda: launch(
            *("-m", "megalodon_mcore", "pretrain", *common, "--load", str(saved), *NEW_RATE)
        ),
    )

    def rate(folder):
        return scalars(tmp_path / folder, "learning-rate")[6]

    assert rate("same") == rate("kept") == pytest.approx(1e-3)
    assert rate("new") == pytest.approx(5e-4)
    assert kept.losses == same.losses
    # Adam's state came along: the first step's loss and gradient do not know the rate yet.
    assert new.losses[4] == same.losses[4] and new.losses[5] != same.losses[5]
    assert silent.returncode == 1 and "Traceback" not in silent.stdout
    assert "--lr is 0.0005 and was 0.001 in the checkpoint; " in silent.stdout
    assert f"with {OVERRIDE} or the old one with {KEEP}." in silent.stdout


def test_another_schedule_without_a_word_is_one_sentence(tmp_path):
    train(tmp_path / "first", *TINY, *save_to(tmp_path / "saved"), "--exit-interval", "3")
    result = launch(
        *("-m", "megalodon_mcore", "pretrain", *TINY, "--load", str(tmp_path / "saved")),
        *("--weight-decay", "0.3"),
    )
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "weight decay is 0.3 and was 0.01 in the checkpoint" in result.stdout
