"""Every Triton kernel compiles for cards that are not here, without spills.

The launches are those that the operators make for tensors of the sizes 200m and 7b, on the meta
device; ptxas reports registers, spills and the shared memory of a block.
"""

from contextlib import nullcontext
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY, compile_for, launches
from megalodon_mcore.kernels.cema.triton import cema_triton
from megalodon_mcore.kernels.chunked_attention import AttentionState
from megalodon_mcore.kernels.chunked_attention import triton as attention_kernels
from megalodon_mcore.kernels.timestep_norm.triton import (
    timestep_norm_triton,
    timestep_statistics_triton,
)

NDIM = 16
KEY_WIDTH, VALUE_WIDTH, CHUNK = 256, 2048, 2048
# Channels, groups, heads.
SIZES = {"200m": (1024, 32, 1), "7b": (4096, 64, 4)}


def norm(channels, groups, dtype, batch, length, masked):
    x = torch.empty(batch, length, channels, dtype=dtype, device="meta", requires_grad=True)
    weight, bias = (torch.empty(channels, device="meta", requires_grad=True) for _ in range(2))
    mask = torch.empty(batch, length, dtype=torch.bool, device="meta") if masked else None
    y, state = timestep_norm_triton(x, weight, bias, groups, 1e-5, None, mask, True)
    torch.autograd.grad((y, state.mean, state.var), (x, weight), (y, state.mean, state.var))


def statistics(channels, groups, dtype, batch, length):
    x = torch.empty(batch, length, channels, dtype=dtype, device="meta", requires_grad=True)
    values = timestep_statistics_triton(x, groups)
    torch.autograd.grad(values, x, values)


def cema(channels, dtype, batch, length):
    shapes = [(channels, NDIM, 1)] * 2 + [(channels, 1, 1), (channels, NDIM, 2), (channels, 1)]
    x = torch.empty(batch, length, channels, dtype=dtype, device="meta", requires_grad=True)
    params = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    # There is no autocast of the meta device, to be switched off either.
    with patch("torch.autocast", lambda *args, **kwargs: nullcontext()):
        y, end = cema_triton(x, *params, None, True)
        torch.autograd.grad((y, end), (x, *params), (y, end))


def attention(heads, dtype, length, cached, dropout_p, capability):
    def draw(positions, width):
        shape = (1, positions, heads, width)
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    leaves = [draw(length, width) for width in (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH)]
    state = AttentionState(draw(cached, KEY_WIDTH), draw(cached, VALUE_WIDTH))
    with patch.object(attention_kernels, "shared_memory", lambda device: SHARED_MEMORY[capability]):
        out, _ = attention_kernels.chunked_attention_triton(*leaves, CHUNK, state, dropout_p)
        torch.autograd.grad(out, leaves, out)


@lru_cache
def launched(size, dtype, capability):
    """The different launches of a training step on 4,096 tokens."""
    channels, groups, heads = SIZES[size]
    found = {}
    for function, arguments in (
        (norm, (channels, groups, dtype, 1, 4096, False)),
        (norm, (channels, groups, dtype, 1, 4096, True)),
        (statistics, (channels, groups, dtype, 1, 4096)),
        (cema, (channels, dtype, 1, 4096)),
        # Too few channels to fill a card, and steps that fill no block: on one card for all.
        *([(cema, (channels // 8, dtype, 1, 4091))] if capability == 90 else []),
        (attention, (heads, dtype, 4096, 0, 0.0, capability)),
        (attention, (heads, dtype, 4096, 0, 0.1, capability)),
    ):
        for launch in launches(function, *arguments):
            source = launch.source()
            found[name_of(launch), source.hash()] = launch
    return list(found.values())


def name_of(launch):
    """The operator's package and the kernel."""
    return f"{launch.kernel.__module__.split('.')[-2]}.{launch.kernel.__name__}"


def test_all_kernels_are_launched():
    names = {name_of(launch) for launch in launched("7b", torch.bfloat16, 90)}
    assert names == {
        *("timestep_norm.totals_kernel", "timestep_norm.forward_kernel"),
        *("timestep_norm.backward_totals_kernel", "timestep_norm.backward_kernel"),
        "timestep_norm.statistics_backward_kernel",
        *("cema.sums_kernel", "cema.forward_kernel", "cema.backward_kernel"),
        *("chunked_attention.forward_kernel", "chunked_attention.delta_kernel"),
        *("chunked_attention.scores_kernel", "chunked_attention.values_kernel"),
    }


# The small size is the one that asks less: a single card stands for all of them.
CARDS = {"200m": list(SHARED_MEMORY)[:1], "7b": list(SHARED_MEMORY)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("size", "capability"), [(size, card) for size, cards in CARDS.items() for card in cards]
)
def test_compiles_without_spills(size, dtype, capability):
    for launch in launched(size, dtype, capability):
        report = compile_for(launch, capability)
        name = name_of(launch)
        constants = {k: v for k, v in launch.keywords.items() if v is True}
        print(f"{size} {dtype} {capability} {name} {' '.join(constants)}: {report}")
        assert report.spilled == 0, (name, report)
        assert report.shared <= SHARED_MEMORY[capability], (name, report)


@pytest.mark.slow
def test_smallest_tensors_compile():
    """Where Triton takes sizes of one for constants."""
    calls = [
        (norm, (1, 1, torch.float32, 1, 1, True)),
        (statistics, (1, 1, torch.float32, 1, 1)),
        (cema, (1, torch.float32, 1, 16)),
        (attention, (1, torch.float32, 1, 1, 1e-10, 90)),
    ]
    for function, arguments in calls:
        for launch in launches(function, *arguments):
            compile_for(launch, 90)


def test_matrix_products_take_tensor_cores():
    """CEMA's: warp-level matrix instructions in TF32, none of them a loop of scalar products."""
    import triton
    from triton.backends.compiler import GPUTarget

    launch = next(
        launch
        for launch in launched("200m", torch.bfloat16, 90)
        if name_of(launch) == "cema.backward_kernel"
    )
    compiled = triton.compile(
        launch.source(), target=GPUTarget("cuda", 90, 32), options=launch.options()
    )
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [(80, "mma.sync.aligned.m16n8k16"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")],
)
def test_attention_takes_the_tensor_cores_of_its_card(capability, instruction):
    import triton
    from triton.backends.compiler import GPUTarget

    launch = launches(attention, 1, torch.bfloat16, 4096, 0, 0.0, capability)[0]
    compiled = triton.compile(
        launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options()
    )
    assert instruction in compiled.asm["ptx"]
