"""The quickstart on a small text: what it writes, that it resumes, and that it reuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEYS = {
    *("parameters", "train_tokens", "tokens_per_second", "valid_loss"),
    *("unigram_loss", "bigram_loss", "checkpoint", "plot", "sample"),
}


def run_quickstart(text: Path, out: Path, *extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "examples/quickstart.py", "--text", str(text), "--out", str(out)),
            *("--iterations", "4", *extra),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_quickstart_writes_its_results_and_reuses_them(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples" / "quickstart.py").read_text() * 20)
    out = tmp_path / "out"
    first = run_quickstart(text, out)
    assert first.returncode == 0, first.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert 2_500_000 < summary["parameters"] < 3_500_000
    assert summary["train_tokens"] == 4 * 8 * 512
    assert 1.0 < summary["valid_loss"] < 10.0
    assert summary["bigram_loss"] < summary["unigram_loss"]
    for name in ("plot", "sample"):
        assert Path(ROOT, summary[name]).stat().st_size > 100

    log_size = (out / "train.log").stat().st_size
    second = run_quickstart(text, out)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "Reusing the trained checkpoint" in second.stdout
    assert (out / "train.log").stat().st_size == log_size
    assert json.loads((out / "summary.json").read_text()) == summary

    other = run_quickstart(text, out, "--iterations", "5")
    assert other.returncode == 1
    assert "give --out another folder" in other.stderr
