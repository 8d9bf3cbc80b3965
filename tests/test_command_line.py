"""The commands' help, what describe prints, and one-sentence errors."""

import subprocess
import sys

import pytest

from building import LISTED
from megalodon_mcore import describe
from megalodon_mcore.__main__ import main


@pytest.mark.parametrize(
    "command",
    [
        *([], ["prepare-data"], ["generate"], ["evaluate"], ["evaluate", "text"], ["describe"]),
        ["compare"],
    ],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: megalodon-mcore" in capsys.readouterr().out


def test_pretrain_help_has_megatrons_and_our_arguments():
    result = subprocess.run(
        [sys.executable, "-m", "megalodon_mcore", "pretrain", "--help"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "--megalodon-chunk-size" in result.stdout
    assert "--tensor-model-parallel-size" in result.stdout


def test_interrupted_it_says_so_in_a_line(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "run", interrupt)
    assert main(["describe", "--preset", "200m"]) == 130
    assert capsys.readouterr().err == "megalodon-mcore describe: interrupted.\n"


@pytest.mark.parametrize("size", LISTED)
def test_describe_prints_the_exact_total(size, capsys):
    assert main(["describe", "--preset", size]) == 0
    assert f"{LISTED[size]:,}" in capsys.readouterr().out


def test_describe_takes_overrides(capsys):
    assert main(["describe", "--preset", "200m", "--set", "chunk_size=512"]) == 0
    keys_and_values = 12 * 512 * (256 + 2048) * 2
    assert f"{keys_and_values:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["describe", "--preset", "200m", "--set", "z_dim=many"], "z_dim takes an integer"),
        (
            ["describe", "--preset", "1.3b", "--set", "z_dim=7"],
            "the 2 heads (--num-attention-heads)",
        ),
        (["generate", "--checkpoint", "nowhere", "--prompt", "x"], "no finished checkpoint"),
        (["generate", "--checkpoint", "nowhere", "--top-p", "2"], "--top-p is 2.0"),
        (["generate", "--checkpoint", "nowhere", "--tokens", "0"], "--tokens is 0"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    ours = [line for line in capsys.readouterr().err.splitlines() if "megalodon-mcore" in line]
    assert len(ours) == 1 and sentence in ours[0]
