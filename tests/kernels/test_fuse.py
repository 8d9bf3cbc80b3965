"""The compiled loops of the portable paths, against the float64 oracles and their eager selves."""

import os
import subprocess
import sys

import pytest
import torch
from megalodon_mcore.kernels import fuse
from megalodon_mcore.kernels.fuse import fused, fuses
from megalodon_mcore.kernels.gates import portable as gates
from megalodon_mcore.kernels.row_norm import portable as row_norm
from megalodon_mcore.kernels.timestep_norm import portable as timestep_norm
from megalodon_mcore.kernels.timestep_norm import timestep_statistics
from torch.overrides import TorchFunctionMode

import test_gates as of_gates
import test_row_norm as of_row_norm
import test_timestep_norm as of_timestep_norm
from comparing import error
from megalodon_mcore import cpu


@pytest.fixture
def compiler():
    if not fuse._compiler_works():
        pytest.skip("torch's compiler finds no C++ compiler that works")


@pytest.fixture
def always(monkeypatch, compiler):
    monkeypatch.setenv("MEGALODON_KERNELS", "torch")
    monkeypatch.setenv("MEGALODON_FUSE", "1")
    for module in (gates, row_norm, timestep_norm):
        for stage in stages(module):
            monkeypatch.setattr(stage, "loops", {})


def fast_and_naive(of, name, leaves):
    """Pairs of a fused operator's and its oracle's results, by the operator's own tests."""
    fast = of.run(of.FAST[name], leaves)
    return zip(fast, of.run(of.NAIVE[name], leaves, torch.float64), strict=True)


def stages(module):
    return [z for z in vars(module).values() if isinstance(z, fused)]


def loops(module):
    """How many loops the stages of a module have made in this test."""
    return sum(len(stage.loops) for stage in stages(module))


def test_when_it_fuses(monkeypatch, compiler):
    monkeypatch.delenv("MEGALODON_FUSE", raising=False)
    large, small = torch.empty(fuse.FUSE_FROM), torch.empty(fuse.FUSE_FROM - 1)
    assert fuses(large) and fuses(large.bfloat16()) and fuses(torch.nn.Parameter(large))
    assert not fuses(small) and not fuses(large.double()) and not fuses(large.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert not fuses(torch.empty(fuse.FUSE_FROM))
    monkeypatch.setenv("MEGALODON_FUSE", "1")
    assert fuses(small) and not fuses(small[:0]) and not fuses(small.double())
    monkeypatch.setenv("MEGALODON_FUSE", "0")
    assert not fuses(large)
    monkeypatch.setenv("MEGALODON_FUSE", "yes")
    with pytest.raises(ValueError, match="MEGALODON_FUSE is 'yes'; it must be 0, 1 or unset"):
        fuses(large)


def test_a_loop_for_every_layout_and_constant(always):
    runs = []

    def stage(x, factor, y):
        runs.append(fuse.compiling())
        return x * factor + y

    stage = fused(stage)
    x = torch.randn(6, 4, requires_grad=True)
    for _ in range(2):
        for a, factor in ((x, 2.0), (x, 3.0), (x.T, 2.0), (x.bfloat16(), 2.0)):
            result = stage(a, factor, a)
            assert not result.requires_grad
            torch.testing.assert_close(result, a.detach() * factor + a.detach())
    assert runs == [True] * 4 and not fuse.compiling()
    for rows in range(1, 12):
        y = torch.randn(rows, 3)
        torch.testing.assert_close(stage(y, 1.0, y), 2 * y)
    assert len(stage.loops) == fuse.SHAPES and runs[fuse.SHAPES :] == [False] * 7


def test_what_a_caller_has_switched_on_does_not_matter(always):
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} reached the mode.")

    stage = fused(lambda x: (x @ x.mT).sin())
    x = torch.randn(5, 5)
    wanted = stage.stage(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert stage(x).dtype == torch.float32
    with torch.inference_mode():
        assert not fuses(x)
    torch.testing.assert_close(stage(x), wanted)
    y = torch.randn(7, 7)
    with cpu.stand_in_for_cuda():
        torch.testing.assert_close(stage(y), stage.stage(y))
    assert len(stage.loops) == 2


def test_without_a_compiler(tmp_path):
    script = """
import torch
from megalodon_mcore.kernels.fuse import fuses
from megalodon_mcore.kernels.gates import swiglu
x = torch.ones(2, 8)
assert not fuses(x) and swiglu(x).shape == (2, 4)
"""
    environment = os.environ | {
        "MEGALODON_FUSE": "1",
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Large tensors stay on the slower eager path" in result.stderr


@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups", "state", "mask"),
    [(2, 37, 10, 1, True, False), (3, 64, 96, 3, True, True)],
)
def test_timestep_norm(always, batch, length, channels, groups, state, mask):
    torch.manual_seed(0)
    x, weight, bias, state, mask = of_timestep_norm.random_inputs(
        batch, length, channels, groups, state=state, mask=mask
    )
    run, given = of_timestep_norm.run, (x, weight, bias, groups, state, mask)
    values, grads, _ = run(of_timestep_norm.timestep_norm, *given)
    torch.use_deterministic_algorithms(True)
    try:
        # What is uninitialized then holds NaN.
        again, grads_again, _ = run(of_timestep_norm.timestep_norm, *given)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip([*values, *grads], [*again, *grads_again], strict=True):
        assert torch.equal(a, b)
    expected, expected_grads, _ = run(
        of_timestep_norm.timestep_norm_naive, *given, dtype=torch.float64
    )
    assert loops(timestep_norm) == 10
    for actual, wanted in zip([*values, *grads], [*expected, *expected_grads], strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, wanted) < 1e-6


def test_timestep_norm_of_a_large_mean(always):
    """Where the deviation is 1e-4 of the mean: as accurate as eager."""
    torch.manual_seed(0)
    x, weight, bias, _, _ = of_timestep_norm.random_inputs(1, 512, 64, 2, state=False)
    given = (x + 2e4, weight, bias, 2, None, None)
    values, grads, _ = of_timestep_norm.run(of_timestep_norm.timestep_norm, *given)
    expected, expected_grads, _ = of_timestep_norm.run(
        of_timestep_norm.timestep_norm_naive, *given, dtype=torch.float64
    )
    for actual, wanted in zip([*values, *grads], [*expected, *expected_grads], strict=True):
        assert error(actual, wanted) < 1e-6


def test_timestep_statistics(always):
    torch.manual_seed(0)
    x = (torch.randn(2, 40, 24) * 2 + 3).requires_grad_()
    mean, var = timestep_statistics(x, 3)
    double = x.detach().double().requires_grad_()
    grouped = double.unflatten(-1, (3, 8))
    wanted = grouped.mean((1, 3)), grouped.var((1, 3), correction=0)
    for actual, reference in zip((mean, var), wanted, strict=True):
        assert error(actual, reference) < 1e-7
    draws = [torch.randn_like(mean) for _ in range(2)]
    grad = torch.autograd.grad([mean, var], x, draws)[0]
    assert error(grad, torch.autograd.grad(wanted, double, draws)[0]) < 1e-6


@pytest.mark.parametrize(("name", "transposed"), [("gated", True), ("swiglu", False)])
def test_gates_match(always, name, transposed):
    torch.manual_seed(0)
    leaves = of_gates.inputs(name, (5, 3, 96), transposed=transposed)
    pairs = fast_and_naive(of_gates, name, leaves)
    assert loops(gates) == 2
    for a, w in pairs:
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), w, rtol=2e-6, atol=2e-6)


def test_rms_norm(always):
    torch.manual_seed(0)
    of_row_norm.compare("rms", of_row_norm.inputs("rms", (37, 3, 20)), 1e-6)
    assert loops(row_norm) == 3


def test_a_gate_keeps_its_inputs_alone(always):
    gate, x = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    kept = of_gates.gated_silu(gate, x).grad_fn.saved_tensors
    assert [z.data_ptr() for z in kept] == [gate.data_ptr(), x.data_ptr()]


@pytest.mark.parametrize("name", of_row_norm.FAST)
def test_row_norms_of_bfloat16(always, name):
    """Rounded once, at the end."""
    torch.manual_seed(0)
    leaves = of_row_norm.inputs(name, (37, 3, 20), torch.bfloat16)
    pairs = fast_and_naive(of_row_norm, name, leaves)
    assert loops(row_norm) == 3
    for index, (a, w) in enumerate(pairs):
        bound = 2**-8 if index < 2 else 1e-6
        torch.testing.assert_close(a.double(), w, rtol=bound, atol=bound * float(w.abs().max()))


@pytest.mark.parametrize("name", of_gates.FAST)
def test_gates_of_bfloat16(always, name):
    torch.manual_seed(0)
    leaves = of_gates.inputs(name, (5, 9, 40), torch.bfloat16)
    for a, w in fast_and_naive(of_gates, name, leaves):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), w, rtol=2**-8, atol=1e-5)
