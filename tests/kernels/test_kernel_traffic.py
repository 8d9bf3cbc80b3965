"""The counts of examples/benchmarks/kernel_traffic.py, at shapes small enough to check by hand."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.interpreted


@pytest.fixture
def traffic(monkeypatch):
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("MEGALODON_KERNELS", "triton")
    import kernel_traffic

    return kernel_traffic


def shape_of(traffic, **values):
    return traffic.SIZES["tiny"]._replace(**values)


@pytest.mark.parametrize("name", ["TimestepNorm", "TimestepNorm, packed"])
def test_timestep_norm_reads_its_inputs_twice(traffic, name):
    """Once for the statistics and once to use them. These are 12 bytes a step and group, written
    and read twice; 64 backward; a program's part of the parameters' gradients is written and read.
    """
    from megalodon_mcore.kernels.timestep_norm import triton as kernels

    shape = shape_of(traffic, batch=2, length=512, channels=128, groups=2)
    with patch.object(kernels, "PROGRAMS", 8):
        counts = traffic.measure(traffic.EVERY[name], shape, torch.bfloat16)
    numbers, statistics = 2 * 512 * 128, 2 * 512 * 2
    for count, tensors, rest in ((counts["forward"], 3, 48), (counts["backward"], 5, 64)):
        wanted = 2 * tensors * numbers + rest * statistics
        assert wanted <= count.moved < 1.07 * wanted
        assert count.moved < 1.9 * count.floor
        assert count.flops == 0


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "gate", "SwiGLU", "timestep statistics"])
def test_row_and_elementwise_kernels_are_near_the_floor(traffic, name):
    shape = shape_of(traffic, length=512, channels=256, value_width=512, ffn=512)
    counts = traffic.sliced(name, shape, torch.bfloat16, 2)
    for count in counts.values():
        assert 1 <= count.moved / count.floor < 1.3


@pytest.mark.parametrize(("name", "parameters"), [("RMSNorm", 1), ("LayerNorm", 2)])
def test_row_norms_read_their_parameters_once_a_program(traffic, name, parameters):
    """A row is a tile, as at 7b. Each row leaves its rms, or mean and deviation."""
    from megalodon_mcore.kernels.row_norm import triton as kernels

    shape = shape_of(traffic, batch=2, length=32, channels=256)
    with patch.multiple(kernels, TILE=256, PROGRAMS=4):
        counts = traffic.measure(traffic.OPERATORS[name], shape, torch.bfloat16)
    rows, programs = 2 * 32, 2 * 4
    wanted = 2 * rows * 256 * 2 + parameters * (4 * rows + programs * 256 * 4)
    assert counts["forward"].moved == wanted


def test_query_and_key_read_a_row_of_turns_for_a_tile(traffic):
    """Weight, bias and the turns inside a tile are read once a program, which walks 8 tiles.

    Five fields say where a tile is.
    """
    from megalodon_mcore.kernels.query_key import triton as kernels

    shape = shape_of(traffic, batch=1, length=512, heads=2, key_width=64, chunk=128)
    steps, programs, tiles = kernels.TILE // 64, 2 * 2, 2 * 512 // (kernels.TILE // 64)
    with patch.object(kernels, "PROGRAMS", programs):
        counts = traffic.measure(traffic.OPERATORS["query and key"], shape, torch.bfloat16)
    row = 64 * 4
    tables = programs * (4 + steps) * row + tiles * (row + 5 * 8)
    assert counts["forward"].moved == 3 * (512 * 128) * 2 + tables
    for count in counts.values():
        assert 1 <= count.moved / count.floor < 1.3


@pytest.mark.parametrize("name", ["TimestepNorm", "CEMA"])
def test_a_slice_of_the_width_stands_for_all(traffic, name):
    shape = shape_of(traffic, batch=1, length=256, channels=128, groups=4)
    whole, slices = (traffic.sliced(name, shape, torch.float32, by) for by in (1, 2))
    for direction in whole:
        kernels = slices[direction].kernels
        for kernel, count in whole[direction].kernels.items():
            if "torch" not in kernel:
                assert count.moved == pytest.approx(kernels[kernel].moved, rel=1e-3)
                assert count.flops == kernels[kernel].flops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_token_of_cema_moves(traffic, dtype):
    """x and y once each, backward both gradients and x, and of the kept states a quarter of x.

    A tile's row in the table is the rest.
    """
    from megalodon_mcore.kernels.cema import triton as kernels

    counts = []
    for length in (256, 512):
        shape = shape_of(traffic, batch=1, length=length, channels=8, groups=1)
        with patch.multiple(kernels, PROGRAMS=1, CHANNELS=8):
            counts.append(traffic.measure(traffic.OPERATORS["CEMA"], shape, dtype))

    def more(direction, kernel):
        short, long = (count[direction].kernels[kernel].moved for count in counts)
        return (long - short) / (dtype.itemsize * 256 * 8)

    assert more("forward", "forward_kernel") == pytest.approx(2.25, abs=0.005)
    assert more("backward", "backward_kernel") == pytest.approx(3.25, abs=0.005)


@pytest.mark.parametrize("name", ["CEMA", "CEMA, packed"])
def test_cema_is_near_the_floor(traffic, name):
    """All its bytes, where channels alone fill the card."""
    from megalodon_mcore.kernels.cema import triton as kernels

    shape = shape_of(traffic, batch=1, length=16384, channels=8, groups=1)
    with patch.object(kernels, "PROGRAMS", 1):
        counts = traffic.measure(traffic.EVERY[name], shape, torch.bfloat16)
    for count in counts.values():
        assert not any("sums" in kernel for kernel in count.kernels)
        assert 1 <= count.moved / count.floor <= 1.3


@pytest.mark.parametrize("name", ["attention", "attention, packed"])
def test_attention_flops(traffic, name):
    """One chunk of one tile: two products, square, where half of each is needed.

    Forward takes the scores twice, and writes weights that are read again.

    Packed documents are 64 at most, here of one step or two, and take a tile each.
    """
    shape = shape_of(traffic, batch=1, length=32, heads=1, key_width=16, value_width=32, chunk=32)
    operator = traffic.EVERY[name]
    counts = traffic.measure(operator, shape, torch.bfloat16)
    tiles = 1
    if "packed" in name:
        from operators import documents

        lengths = [segment.length for segment in documents(shape)]
        tiles, needed = len(lengths), sum(n * (n + 1) for n in lengths)
        assert counts["forward"].needed == needed * (16 + 32)
    else:
        assert counts["forward"].needed == 2 * 32 * 33 / 2 * (16 + 32)
        assert counts["forward"].moved < 1.2 * (counts["forward"].floor + 2 * 32 * 32 * 2)
    assert counts["forward"].flops == tiles * 2 * 32 * 32 * (16 + 16 + 32)
    assert counts["backward"].flops == tiles * 2 * 32 * 32 * (16 + 32 + 16 + 16 + 32)
