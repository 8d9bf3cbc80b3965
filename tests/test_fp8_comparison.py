"""examples/fp8_comparison.py from text to table and plot, once."""

import re
import sys

import pytest

import fp8_comparison
from megalodon_mcore.__main__ import main
from training.runs import PRETRAIN, launch


def run_command(command, *arguments, log):
    """Training in a fork of a process that has Megatron loaded, the rest here."""
    if command != "pretrain":
        assert main([command, *arguments]) == 0
        return
    # Two steps do not pay for compiling.
    done = launch(*PRETRAIN, *arguments)
    log.write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_it_trains_measures_and_draws(tmp_path, monkeypatch, load_model):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of {n * n} lines.\n\n" for n in range(3000)))
    monkeypatch.setattr(fp8_comparison, "run_command", run_command)
    monkeypatch.setattr(fp8_comparison, "GRADIENT_BATCHES", 1)
    arguments = [str(text), "--out", str(tmp_path), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["fp8_comparison.py", *arguments])
    fp8_comparison.main()
    table = (tmp_path / "2-steps" / "table.md").read_text()
    losses = re.findall(r"^\| (\w.*?) \| ([\d.]+) \| ([\d.]+) \| ([-+][\d.]+) \|$", table, re.M)
    assert [row[0] for row in losses] == [
        *("float32", "BF16", "FP8 tensorwise", "FP8 blockwise", "FP8 mxfp8")
    ]
    # After two steps from the same start they are near each other, and not the same.
    validation = [float(row[2]) for row in losses]
    assert max(validation) - min(validation) < 0.05
    assert len({row[1] for row in losses}) > 1
    errors = dict(re.findall(r"^\| (all|linear_\w+) \| ([\d.]+)% \|", table, re.M))
    assert errors.keys() == {
        *("all", "linear_z", "linear_v", "linear_r", "linear_proj", "linear_fc1", "linear_fc2")
    }
    assert all(0 < float(error) < 50 for error in errors.values())
    assert float(errors["all"]) > float(errors["linear_z"])
    assert (tmp_path / "2-steps" / "loss.png").stat().st_size > 10_000
