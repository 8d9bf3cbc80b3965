"""The row norms', gates' and query_key's kernels: they compile without spills, and move little.

Launches are those that the operators make on the meta device at the sizes 200m and 7b.
"""

from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY, compile_for, launches
from megalodon_mcore.kernels.gates.triton import gated_silu_triton, swiglu_triton
from megalodon_mcore.kernels.query_key.triton import query_key_triton
from megalodon_mcore.kernels.row_norm.triton import layer_norm_triton, rms_norm_triton

# Channels, value and FFN width, heads, chunk size.
SIZES = {"200m": (1024, 2048, 2560, 1, 2048), "7b": (4096, 8192, 8192, 4, 4096)}


def tensors(*shapes, dtype=torch.float32):
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]


def both_ways(function, leaves):
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, leaves, outputs)
    return outputs


def transposed(x):
    """[A, B, D] whose memory is [B, A, D]."""
    return torch.empty_like(x).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


def operators(size, dtype, length, batch=1):
    """Each as a layer calls it: a function and the tensors it is differentiated by."""
    channels, values, hidden, heads, chunk = SIZES[size]
    (x,) = tensors((length, batch, channels), dtype=dtype)
    (gate,) = tensors((length, batch, values), dtype=dtype)
    (fc1,) = tensors((length, batch, 2 * hidden), dtype=dtype)
    z = tensors((length, batch, heads, channels // 4 // heads), dtype=dtype)[0].transpose(0, 1)
    vector = tensors((channels,), (channels,))
    return {
        "rms_norm": (lambda *a: rms_norm_triton(*a, 1e-5), [transposed(x), vector[0]]),
        "layer_norm": (lambda *a: layer_norm_triton(*a, 1e-5), [x, *vector]),
        "gated_silu": (gated_silu_triton, [gate, transposed(gate)]),
        "swiglu": (swiglu_triton, [fc1]),
        "query_key": (
            lambda *a: query_key_triton(*a, 1e-5, 1e5, 0, chunk),
            [z, *tensors((2, channels // 4), (2, channels // 4))],
        ),
    }


@lru_cache
def launched(size, dtype):
    """The launches of a training step on 4,096 tokens: each operator's forward and backward."""
    return {
        name: launches(both_ways, *given)
        for name, given in operators(size, dtype, 2048, batch=2).items()
    }


def test_two_kernels_an_operator():
    for name, made in launched("7b", torch.bfloat16).items():
        kernels = [launch.kernel.__name__ for launch in made]
        assert kernels == ["forward_kernel", "backward_kernel"], name


# The small size is the one that asks less: a single card stands for all of them.
CARDS = {"200m": list(SHARED_MEMORY)[:1], "7b": list(SHARED_MEMORY)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("size", "capability"), [(size, card) for size, cards in CARDS.items() for card in cards]
)
def test_compiles_without_spills(size, dtype, capability):
    for operator, made in launched(size, dtype).items():
        for launch in made:
            report = compile_for(launch, capability)
            name = f"{operator} {launch.kernel.__name__}"
            print(f"{size} {dtype} {capability} {name}: {report}")
            assert report.spilled == 0, (name, report)
            assert report.shared <= SHARED_MEMORY[capability], (name, report)


@pytest.mark.slow
def test_smallest_tensors_compile():
    """Where Triton takes sizes of one for constants."""
    vectors = tensors((1,), (1,))
    calls = [
        (lambda *a: rms_norm_triton(*a, 1e-5), [*tensors((1, 1, 1)), vectors[0]]),
        (lambda *a: layer_norm_triton(*a, 1e-5), [*tensors((1, 1, 1)), *vectors]),
        (gated_silu_triton, tensors((1, 1), (1, 1))),
        (swiglu_triton, tensors((1, 2))),
        (
            lambda *a: query_key_triton(*a, 1e-5, 1e4, 0, 1),
            tensors((1, 1, 1, 2), (2, 2), (2, 2)),
        ),
    ]
    for function, leaves in calls:
        for launch in launches(both_ways, function, leaves):
            compile_for(launch, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_moves_little_more_than_inputs_and_outputs(size, dtype):
    """What a pass is given and returns, against the tensors that its kernel reads or writes.

    Each kernel touches each of its tensors once, but for partial sums of the parameters' gradients,
    which torch reads again. This counts bytes; how fast they move only a card can tell.
    """
    for name, (function, leaves) in operators(size, dtype, 8192).items():
        outputs = []
        forward, backward = launches(
            lambda f, x, o=outputs: o.extend(both_ways(f, x)), function, leaves
        )
        given, returned = sum(map(memory, leaves)), sum(map(memory, outputs))
        assert touched(forward) <= 1.3 * (given + returned), name
        assert touched(backward) <= 1.3 * (2 * given + returned), name


def test_a_million_positions_fit_the_sides_of_a_grid():
    """CUDA takes 2^31 - 1 blocks along the first side, and 65,535 along the others."""
    for name, given in operators("7b", torch.bfloat16, 2**20).items():
        for launch in launches(both_ways, *given):
            first, *others = launch.keywords["grid"]
            assert first < 2**31 and all(side <= 65_535 for side in others), name


def memory(tensor):
    return tensor.numel() * tensor.element_size()


def touched(launch):
    """Bytes of a launch's tensors, of views the part that they show."""
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return sum(
        memory(value) * (2 if name == "partial" else 1)
        for name, value in named
        if isinstance(value, torch.Tensor)
    )
