"""Every Triton kernel compiles for cards that are not here, by this Triton.

The launches are those that the operators make for tensors of real sizes, on the meta device. The
machine code tells registers, spills and the shared memory of a block.
"""

import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from megalodon_mcore.kernels.paged_attention import paged_attention

from ahead_of_time import launches, report
from compiling import EVERY, train
from operators import OPERATORS, Shape
from stage import MODULES


@lru_cache
def launched(name, size="200m", length=4096, batch=1, dtype=torch.bfloat16):
    return launches(train, EVERY[name], Shape.named(size, length, batch), dtype)


def test_all_kernels_are_launched():
    names = {launch.name for name in EVERY for launch in launched(name)}
    assert names == {
        *("timestep_norm.moments_kernel", "timestep_norm.scan_kernel"),
        *("timestep_norm.apply_kernel", "timestep_norm.terms_kernel"),
        *("timestep_norm.scan_back_kernel", "timestep_norm.input_gradient_kernel"),
        "timestep_norm.spread_kernel",
        *("cema.forward_kernel", "cema.backward_kernel"),
        *("cema.sums_kernel", "cema.summary_backward_kernel"),
        *("chunked_attention.weights_kernel", "chunked_attention.delta_kernel"),
        *("chunked_attention.scores_kernel", "chunked_attention.product_kernel"),
        *("row_norm.forward_kernel", "row_norm.backward_kernel"),
        *("gates.forward_kernel", "gates.backward_kernel"),
        *("query_key.forward_kernel", "query_key.backward_kernel"),
    }


@pytest.mark.slow
def test_compiles_without_spills(tmp_path):
    """For three cards; tests/test_gpu_rehearsal.py does one with the oldest Triton."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(MODULES)
    file = tmp_path / "rows"
    part = "80:7b-paper:float32 90:7b-paper:bfloat16,float32 100:7b-paper:bfloat16"
    command = [
        sys.executable,
        "-m",
        "compiling",
        "--stage",
        "compile",
        "--rows",
        file,
        "--part",
        part,
        "--rehearse",
    ]
    subprocess.run([*command, "--seconds", "900"], env=environment, check=True, timeout=1000)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["capability"] for row in rows} == {80, 90, 100}
    launches = {launch.name for name in EVERY for launch in launched(name)}
    assert {row["kernel"] for row in rows} >= launches
    for row in rows:
        assert row["verdict"] == "pass", row


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_new_length_compiles_nothing_anew(name):
    """TimestepNorm's scans take one of four blocks, by the longest document."""
    kernels = {}
    names = ("OF_QUERIES", "COLUMNS", "REVERSE", "BLOCK")
    for length in (4096, 8192, 5000, 4099):
        for launch in launched(name, length=length):
            constants = tuple(v for k, v in launch.keywords.items() if k in names)
            constants += tuple(z is None for z in launch.arguments)
            kernels.setdefault((launch.name, constants), set()).add(launch.compile(90).hash)
    for kernel, compiled in kernels.items():
        assert len(compiled) == 1, kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_smallest_tensors_compile(name):
    """Where Triton takes sizes of one for constants."""
    shape = Shape(1, 1, 1, 1, 1, 2, 1, 1, 1)
    for launch in launches(train, EVERY[name], shape, torch.float32):
        launch.compile(90)


def test_matrix_products_take_tensor_cores():
    """CEMA's: warp-level matrix instructions in TF32, none of them a loop of scalar products."""
    launch = next(z for z in launched("CEMA") if z.name == "cema.backward_kernel")
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in launch.compile(90).asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_core_adds_to_sums_over_tiles(dtype):
    """They cut digits off, which over a million steps cost the parameters' gradients 2e-4."""
    launch = next(z for z in launched("CEMA", dtype=dtype) if z.name == "cema.backward_kernel")
    code = launch.compile(90).asm["ttir"]
    loops = re.findall(r"iter_args\((.*?)\)", code)
    carried = {name for loop in loops for name in re.findall(r"(%\w+) =", loop)}
    added_to = set(re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", code))
    assert any(name.startswith("%to_w_real") for name in carried)
    assert added_to
    assert not added_to & carried


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [(80, "mma.sync.aligned.m16n8k16"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")],
)
def test_attention_takes_the_tensor_cores_of_its_card(capability, instruction, monkeypatch):
    from megalodon_mcore.kernels.chunked_attention import triton as kernels

    monkeypatch.setattr(kernels, "shared_memory", lambda device: 163 * 1024)
    launch = launches(train, EVERY["attention"], Shape.named("200m", 4096), torch.bfloat16)[0]
    assert instruction in launch.compile(capability).asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", ["200m", "7b-paper"])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "query and key", "gate", "SwiGLU"])
def test_moves_little_more_than_inputs_and_outputs(name, size, dtype):
    """What a pass is given and returns, against the tensors that its kernel reads or writes.

    Each kernel touches each of its tensors once, but for partial sums of the parameters' gradients,
    which torch reads again. This counts bytes; how fast they move only a card can tell.
    """
    shape = Shape.named(size, 8192)
    given = sum(map(memory, OPERATORS[name].inputs(shape, dtype, torch.device("meta"))))
    forward, backward = launched(name, size, 8192, 1, dtype)
    returned = sum(memory(z) for k, z in named(forward) if k in ("y_ptr", "query_ptr", "key_ptr"))
    assert returned
    assert touched(forward) <= 1.3 * (given + returned)
    assert touched(backward) <= 1.3 * (2 * given + returned)


@pytest.mark.parametrize(("length", "batch"), [(2**20, 1), (17, 70_000)])
@pytest.mark.parametrize("name", EVERY)
def test_long_and_many_sequences_fit_the_sides_of_a_grid(name, length, batch):
    """CUDA takes 2^31 - 1 blocks along the first side, and 65,535 along the others."""
    for launch in launched(name, "7b-paper", length, batch):
        first, *others = launch.grid
        assert first < 2**31 and all(side <= 65_535 for side in others)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", ["200m", "7b-paper"])
def test_decoding_compiles_without_spills(size, dtype):
    shape, requests, pages = Shape.named(size), 3, 5
    with torch.device("meta"):
        q = torch.empty(requests, shape.heads, shape.key_width, dtype=dtype)
        keys, values = (
            torch.empty(pages, shape.heads, shape.chunk, width, dtype=dtype)
            for width in (shape.key_width, shape.value_width)
        )
        numbers = torch.empty(2, requests, dtype=torch.int64)
    found = launches(paged_attention, q, keys, values, *numbers)
    assert [z.kernel.__name__ for z in found] == ["split_kernel", "join_kernel"]
    for launch, capability in product(found, (80, 90, 100)):
        assert not report(launch.compile(capability)).spilled


def memory(tensor):
    return tensor.numel() * tensor.element_size()


def named(launch):
    """A launch's tensors, by the names of the kernel's parameters."""
    pairs = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return [(name, value) for name, value in pairs if isinstance(value, torch.Tensor)]


def touched(launch):
    """Bytes of a launch's tensors, of views the part that they show."""
    return sum(memory(value) * (2 if name == "partial" else 1) for name, value in named(launch))
