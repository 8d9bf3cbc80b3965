"""Where Megatron's --split cuts a dataset of so many sequences."""

SHARES = "900,50,50"
"""The usual --split: 90% to train on, 5% to validate and 5% to test with."""


def split_bounds(split: str, sequences: int) -> list[tuple[int, int] | None]:
    """First sequence and end of training, validation and test data; None for a share of zero.

    The arithmetic is Megatron's own, whose rounding can leave nothing of a share that is not zero.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    bounds: list[tuple[int, int] | None] = []
    for share in matrix:
        if share is None:
            bounds.append(None)
        else:
            start, stop = (round(bound * float(sequences)) for bound in share)
            bounds.append((start, stop))
    return bounds


def working_split(sequences: int) -> str:
    """A --split that leaves no share empty: the usual one, or else one sequence a split.

    Two sequences make training and validation data, and one sequence training data alone.
    """
    bounds = split_bounds(SHARES, sequences)
    if all(start < stop for start, stop in bounds):
        return SHARES
    train, valid = max(1, sequences - 2), min(1, sequences - 1)
    return f"{train},{valid},{sequences - train - valid}"
