"""examples/fp8_comparison.py from text to table and plot, once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "fp8_comparison.py"


@pytest.mark.slow
def test_it_trains_measures_and_draws(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of {n * n} lines.\n\n" for n in range(3000)))
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), str(text), "--out", str(tmp_path), "--steps", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        # Two steps do not pay for compiling.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:]
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
