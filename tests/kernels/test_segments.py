"""The table of segments: what it covers, and what it refuses."""

import pytest
import torch
from megalodon_mcore.kernels.segments import Segment, Segments

CPU = torch.device("cpu")


def test_positions_count_from_each_documents_start():
    segments = Segments(5, 2, [Segment(0, 0, 5, 3), Segment(1, 0, 2, 0), Segment(1, 2, 3, 0)])
    assert segments.positions(CPU).T.tolist() == [[3, 4, 5, 6, 7], [0, 1, 0, 1, 2]]
    assert segments.continued and not segments.whole_rows


@pytest.mark.parametrize(
    "wrong",
    [
        [Segment(0, 0, 9, 0)],
        [Segment(0, 0, 3, 0)],
        [Segment(0, 0, 3, 0), Segment(0, 4, 4, 0)],
        [Segment(0, 0, 3, 0), Segment(0, 3, 6, 0)],
        [Segment(0, 0, 0, 0), Segment(0, 0, 8, 0)],
        [Segment(0, 0, 8, -1)],
        [Segment(0, 0, 8, 0), Segment(1, 0, 8, 0)],
    ],
)
def test_what_does_not_cover_the_rows_is_refused(wrong):
    with pytest.raises(ValueError, match="step"):
        Segments(8, 1, wrong)
