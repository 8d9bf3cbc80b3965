"""What tests of several operators measure and draw with."""

import contextlib
import os
import random

import torch
from megalodon_mcore.kernels.segments import Segment, Segments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The relative error of float32 stored as bfloat16.
BFLOAT16 = 2**-8


def seeded(seed):
    """A generator of the device that the tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_segments(seed, length=200, rows=3, most=8):
    """Of up to so many steps and rows, up to `most` segments a row, at position 0 or anywhere."""
    draw = random.Random(seed)
    length, rows, segments = draw.randint(1, length), draw.randint(1, rows), []
    for row in range(rows):
        cuts = draw.sample(range(1, length), draw.randint(0, min(most, length) - 1))
        bounds = [0, *sorted(cuts), length]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            segments.append(
                Segment(row, start, stop - start, draw.choice((0, draw.randint(1, 999))))
            )
    return Segments(length, rows, segments)


@contextlib.contextmanager
def poisoned():
    """Fills with NaN what torch allocates without a value."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(actual, expected):
    """Largest difference, relative to the largest expected value; 0 of nothing."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
