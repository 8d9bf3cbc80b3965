"""The table of segments: what it covers, and what it refuses."""

import pytest
import torch
from megalodon_mcore.kernels.segments import Segment, Segments

import operators
from operators import OPERATORS, SIZES, VARIANTS

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


@pytest.mark.parametrize("name", OPERATORS | VARIANTS)
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_torchs_default_device_does_not_matter(name, path, monkeypatch):
    """Tables are made on the host, the rest where the operator's tensors are."""
    monkeypatch.setenv("MEGALODON_KERNELS", path)
    small = dict(length=41, batch=1, channels=16, groups=2)
    operator, shape = (OPERATORS | VARIANTS)[name], SIZES["tiny"]._replace(**small)
    leaves = operator.inputs(shape, torch.float32, torch.get_default_device())
    for made in (Segments.of_rows, operators.documents):
        made.cache_clear()
    with torch.device("meta"):
        outputs = operator.run(shape, *leaves)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert all(z.isfinite().all() for z in (*outputs, *gradients))
