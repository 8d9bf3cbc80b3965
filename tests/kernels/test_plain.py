"""What torch compiles of the operators' plain functions, against the float64 oracles."""

import os
import subprocess
import sys

import pytest
import torch
from megalodon_mcore.kernels import plain
from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.kernels.timestep_norm import timestep_statistics
from torch._dynamo.utils import counters

import test_gates as of_gates
import test_query_key as of_query_key
import test_row_norm as of_row_norm
import test_timestep_norm as of_timestep_norm
from comparing import error, random_segments
from megalodon_mcore import cpu


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Compiles at any size; a test that takes this calls it for the graphs made so far."""
    monkeypatch.setenv("MEGALODON_KERNELS", "torch")
    monkeypatch.setattr(plain, "COMPILE_FROM", 0)
    torch._dynamo.reset()
    counters.clear()
    double = plain.plain(lambda x: 2 * x)
    double(torch.ones(8))
    if not plain._compiler_works:
        pytest.skip("torch's compiler finds no C++ compiler that works")
    return lambda: counters["stats"]["unique_graphs"]


def pairs(of, name, leaves):
    """What an operator and its oracle give, by the operator's own tests."""
    fast = of.run(of.FAST[name], leaves)
    return zip(fast, of.run(of.NAIVE[name], leaves, torch.float64), strict=True)


@pytest.mark.parametrize(
    ("of", "name", "shape"),
    [
        (of_row_norm, "rms", (37, 3, 20)),
        (of_row_norm, "layer", (37, 3, 20)),
        (of_gates, "gated", (5, 3, 96)),
        (of_gates, "swiglu", (5, 3, 96)),
    ],
)
def test_values_and_gradients(compiled, of, name, shape):
    torch.manual_seed(0)
    before = compiled()
    for a, w in pairs(of, name, of.inputs(name, shape, transposed=True)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), w, rtol=2e-6, atol=2e-6 * float(w.abs().max()))
    # Another length and type: rounded once, at the end.
    for a, w in pairs(of, name, of.inputs(name, (7, *shape[1:]), torch.bfloat16)):
        bound = 2e-6 if a.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(a.double(), w, rtol=bound, atol=1e-5)
    # A forward and a backward pass each.
    assert compiled() - before >= 4 and not counters["graph_break"]


def test_query_key(compiled):
    before = compiled()
    of_query_key.compare(random_segments(1, 60), 2, 10, 8)
    assert compiled() - before >= 2 and not counters["graph_break"]


@pytest.mark.parametrize("offset", [0.0, 2e4])
def test_timestep_norm(compiled, offset):
    """With an offset the deviation is 1e-4 of the mean."""
    torch.manual_seed(0)
    segments = Segments.of_documents([[0, 30, 37], [0, 1, 37]]) if offset else None
    segments = segments or Segments.of_rows(37, 2, 4)
    x, weight, bias, state = of_timestep_norm.random_inputs(segments, 12, 3)
    given = (x + offset, weight, bias, 3, segments, state)
    before = compiled()
    actual = of_timestep_norm.run(of_timestep_norm.timestep_norm, *given)
    assert compiled() - before >= 4 and not counters["graph_break"]
    wanted = of_timestep_norm.run(of_timestep_norm.timestep_norm_naive, *given, dtype=torch.float64)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == torch.float32
        assert error(a, w) < 1e-6


def test_timestep_statistics():
    torch.manual_seed(0)
    x = (torch.randn(40, 2, 24) * 2 + 3).requires_grad_()
    double = x.detach().double().requires_grad_()
    wanted = of_timestep_norm.naive_statistics(double, 3)
    actual = timestep_statistics(x, 3)
    for a, w in zip(actual, wanted, strict=True):
        assert error(a, w) < 1e-7
    draws = [torch.randn_like(z) for z in wanted]
    grad = torch.autograd.grad(actual, x, draws)[0]
    assert error(grad, torch.autograd.grad(wanted, double, draws)[0]) < 1e-6


def test_long_sums():
    """The weight's gradient, of more rows than float32 adds up one by one."""
    torch.manual_seed(0)
    leaves = of_row_norm.inputs("layer", (40_000, 2, 16))
    for a, w in pairs(of_row_norm, "layer", leaves):
        assert error(a, w) < 1e-6


def test_what_is_not_compiled(compiled, monkeypatch):
    from megalodon_mcore.kernels.gates import gated_silu

    x = torch.randn(4, 6)
    before = compiled()
    gated_silu(x.double(), x.double())
    gated_silu(x.to("meta"), x.to("meta"))
    with torch._subclasses.FakeTensorMode():
        gated_silu(torch.empty(2, 3), torch.empty(2, 3))
    with torch.inference_mode():
        gated_silu(x, x)
    monkeypatch.setattr(plain, "COMPILE_FROM", x.numel() + 1)
    gated_silu(x, x)
    assert compiled() == before


def test_lengths_do_not_each_compile(compiled):
    from megalodon_mcore.kernels.gates import swiglu

    before = compiled()
    for length in range(2, 20):
        x = torch.randn(length, 8)
        torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    assert compiled() - before <= 2


def test_in_another_trace():
    from megalodon_mcore.kernels.row_norm import rms_norm

    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    whole = torch.compile(lambda x: rms_norm(x * 2, weight, 1e-5) + 1, fullgraph=True)
    y, wanted = whole(x), rms_norm(x * 2, weight, 1e-5) + 1
    torch.testing.assert_close(y, wanted)
    draw = torch.randn_like(y)
    for a, w in zip(*(torch.autograd.grad(z, [x, weight], draw) for z in (y, wanted)), strict=True):
        torch.testing.assert_close(a, w)


def test_where_the_cpu_stands_in_for_cuda(compiled):
    """Which keeps all else from being compiled."""
    torch.manual_seed(0)
    leaves = of_row_norm.inputs("rms", (9, 2, 4))
    with cpu.install():
        torch.compile(lambda x: x + 1)(leaves[0])
        before = compiled()
        of_row_norm.compare("rms", leaves, 1e-6)
        assert compiled() - before == 2


def test_without_a_compiler(tmp_path):
    script = """
import torch
from megalodon_mcore.kernels import plain
from megalodon_mcore.kernels.gates import swiglu
plain.COMPILE_FROM = 0
x = torch.ones(2, 8, requires_grad=True)
swiglu(x).sum().backward()
assert x.grad.shape == (2, 8)
"""
    environment = os.environ | {
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Large tensors stay on the slower eager path") == 1
