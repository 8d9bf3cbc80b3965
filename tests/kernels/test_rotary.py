"""apply_rotary against one pair at a time in float64."""

import math

import pytest
import torch
from megalodon_mcore.kernels.rotary import apply_rotary


def rotary_naive(x, base, offset, chunk_size):
    x = x.double()
    d = x.shape[-1]
    columns = [None] * d
    for i in range(d // 2):
        positions = [(offset + t) % chunk_size for t in range(x.shape[1])]
        angles = [p * base ** (-2 * i / d) for p in positions]
        cos = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64)[:, None]
        sin = torch.tensor([math.sin(a) for a in angles], dtype=torch.float64)[:, None]
        first, second = x[..., 2 * i], x[..., 2 * i + 1]
        columns[2 * i] = first * cos - second * sin
        columns[2 * i + 1] = first * sin + second * cos
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize(
    ("length", "heads", "d", "offset", "chunk_size"),
    [
        (7, 1, 2, 0, 16),
        (19, 3, 6, 0, 8),
        (19, 2, 10, 13, 8),
        (1, 2, 4, 100_003, 4096),
        (0, 1, 4, 3, 8),
    ],
)
def test_matches_the_oracle(length, heads, d, offset, chunk_size):
    torch.manual_seed(0)
    x = torch.randn(length, 2, heads, d).transpose(0, 1).requires_grad_()
    draw = torch.randn(2, length, heads, d)
    actual = apply_rotary(x, 1e4, offset, chunk_size)
    wanted = rotary_naive(x, 1e4, offset, chunk_size)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(z, x, draw.to(z.dtype))[0] for z in (actual, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def test_gradcheck():
    x = torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: apply_rotary(z, 1e4, 2, 3), x)


def test_bfloat16():
    x = torch.randn(2, 9, 2, 8).bfloat16()
    actual = apply_rotary(x, 1e5, 3, 4)
    assert actual.dtype == torch.bfloat16
    wanted = rotary_naive(x, 1e5, 3, 4)
    torch.testing.assert_close(actual.double(), wanted, rtol=2**-8, atol=1e-6)


def test_any_strides():
    wide = torch.randn(2, 5, 3, 9)
    x = wide[..., 1:7]
    torch.testing.assert_close(
        apply_rotary(x, 1e4, 0, 8).double(), rotary_naive(x, 1e4, 0, 8), rtol=0, atol=1e-6
    )


def test_training_after_inference_with_the_same_table():
    with torch.inference_mode():
        apply_rotary(torch.randn(1, 2, 1, 4), 12345.0, 0, 8)
    x = torch.randn(1, 2, 1, 4, requires_grad=True)
    apply_rotary(x, 12345.0, 0, 8).sum().backward()


def test_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)
    logits = [
        (apply_rotary(q, 1e4, p + 5, 64) * apply_rotary(k, 1e4, p, 64)).sum() for p in (0, 17, 58)
    ]
    torch.testing.assert_close(logits[1:], logits[:1] * 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(1, 2, 1, 3)}, "x is"),
        ({"x": torch.zeros(1, 2, 4)}, "x is"),
        ({"base": 0.0}, "base is"),
        ({"offset": -1}, "offset is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"x": torch.zeros(1, 2, 1, 4), "base": 1e4, "offset": 0, "chunk_size": 8}
    with pytest.raises(ValueError, match=named):
        apply_rotary(**(arguments | change))
