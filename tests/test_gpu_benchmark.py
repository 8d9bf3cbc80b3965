"""examples/benchmarks/gpu.py without a GPU: its refusal, and its rows on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
import gpu

CPU = ["--device", "cpu", "--size", "tiny", "--dtype", "float32", "--seconds", "0.01"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_in_a_sentence_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_rows_on_the_cpu(tmp_path, monkeypatch):
    """Peers compute the same, and what fails is a row beside the others."""
    monkeypatch.setenv("MEGALODON_KERNELS", "")
    monkeypatch.setattr(gpu.peers, "cema_by_fft", lambda *args: 1 / 0)
    output = ["--output", str(tmp_path), "--only", *gpu.OPERATORS]
    rows = gpu.main([*CPU, *output])
    assert (tmp_path / "results.json").exists()
    found = {(row["case"], row["way"]): row for row in rows}
    broken = found.pop(("tiny CEMA", "plain FFT"))
    assert "ZeroDivisionError" in broken["problem"] and broken["seconds"] == 0
    split = found["tiny attention", "SDPA on split heads"]
    assert split["difference"] < 1e-5
    assert len(found) == len(gpu.OPERATORS) + 1
    for row in found.values():
        assert not row["problem"] and row["seconds"] > 0 and row["bytes_share"] > 0
