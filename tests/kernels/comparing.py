"""What tests of several operators measure and cut with."""


def error(actual, expected):
    """Largest difference, relative to the largest expected value; 0 of nothing."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().double().clamp_min(1e-30)
    return float((actual.double() - expected.double()).abs().max() / scale)


def by_three(rows, x):
    """Stands in for `row_blocks`: blocks of three rows."""
    return (slice(start, min(start + 3, rows)) for start in range(0, rows, 3))
