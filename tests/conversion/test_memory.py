"""Conversion holds a few tensors at a time, not a model."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from convert_memory import TINY, conversions, random_checkpoint
from megalodon_mcore.sizes import SIZES


@pytest.mark.slow
def test_what_a_conversion_adds_to_the_process_is_a_small_part_of_the_checkpoint(tmp_path):
    shapes = {"tiny": TINY, "200m": replace(SIZES["200m"], vocab_size=256)}
    peaks = {}
    for name, shape in shapes.items():
        (tmp_path / name).mkdir()
        start = random_checkpoint(tmp_path / name / "mcore", shape, torch.bfloat16)
        size = sum(file.stat().st_size for file in start.rglob("*") if file.is_file())
        steps = conversions(start, tmp_path / name)
        peaks[name] = {step: anonymous for step, anonymous, _, _ in steps}
    assert size > 250 * 2**20
    for step, anonymous in peaks["200m"].items():
        assert anonymous - peaks["tiny"][step] < size / 5, step
