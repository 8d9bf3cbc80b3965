"""TimestepNorm as plain torch functions, for any device.

What has x's size is computed in float32. The statistics, D/G times smaller, are float64, and the
running sums are taken about a shift near the segment's data, so neither the length nor a large mean
costs digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..plain import compiled
from ..segments import Segments
from ..types import compute_dtype
from .autograd import Path

# Steps that torch sums up at once, column by column: so few that they stay in a cache.
STEPS = 32


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    segments: Segments,
    mean_in: Tensor | None,
    var_in: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, running mean (float64) and var [length, batch, G], and both after each segment."""
    tables = _Tables.of(segments, x.device)
    first = x[tables.first].double().unflatten(-1, (groups, -1)).mean(-1)
    shift = _shift(first, mean_in, tables)
    sums = _sums(x, shift[tables.owner], groups)
    if var_in is not None:
        before = tables.position * var_in.double()
        sums[(*tables.first, 1)] += before.where(tables.position > 0, 0.0)
    _run(sums, tables.pieces)
    y, mean, var = _normalized(x, sums, shift[tables.owner], tables.count, weight, bias, eps)
    return y, mean, var, mean[tables.last].to(var.dtype), var[tables.last]


def _backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    mean_in: Tensor | None,
    groups: int,
    eps: float,
    segments: Segments,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of mean and var before each segment.

    With A and V the running mean and variance of n steps and K a shift: v = dL/dV / n and
    a = dL/dA / n - 2 (A - K) v. A scalar x of step t gets sum (a + 2 (x - K) v) / (D/G) from step t
    and those after it.
    """
    tables = _Tables.of(segments, x.device)
    shift = _shift(mean[tables.first], mean_in, tables)
    shifts = shift[tables.owner]
    terms, grad_weight, grad_bias = _terms(x, grad_y, mean, var, shifts, tables.count, weight, eps)
    v = grad_var.double() / tables.end
    a = grad_mean.double() / tables.end - 2 * (mean[tables.last] - shift) * v
    terms[tables.last_backwards] += torch.stack((a, v), 1)
    _run(terms, tables.pieces_backwards)
    grad_x = _input_gradient(x, grad_y, mean, var, shifts, terms, weight, eps)
    before = tables.position[:, None] * terms[tables.first_backwards]
    before = before.where(tables.position[:, None] > 0, 0.0).to(var.dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *before.unbind(1)


class _Tables(NamedTuple):
    """Where the segments are, as the functions below index by it.

    pieces: steps and rows of each segment, or of all. *_backwards are in tensors whose last step
    comes first.
    """

    owner: Tensor
    count: Tensor
    position: Tensor
    end: Tensor
    first: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    first_backwards: tuple[Tensor, Tensor]
    last_backwards: tuple[Tensor, Tensor]
    pieces: list[tuple[slice, slice]]
    pieces_backwards: list[tuple[slice, slice]]

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> "_Tables":
        return segments.kept(("timestep norm", device), lambda: cls._made(segments, device))

    @classmethod
    def _made(cls, segments: Segments, device: torch.device) -> "_Tables":
        row, start, length, position = (
            segments.tensor(name, device) for name in ("row", "start", "length", "position")
        )
        owner, count = segments.owners(device), segments.positions(device) + 1
        if segments.whole_rows:
            owner, count = owner[:1], count[:, :1]
        last, end = start + length - 1, segments.length - 1
        pieces = _pieces(segments)
        return cls(
            owner,
            count[..., None].double(),
            position[:, None],
            (position + length)[:, None].double(),
            (start, row),
            (last, row),
            (end - start, row),
            (end - last, row),
            pieces,
            [(slice(end + 1 - s.stop, end + 1 - s.start), rows) for s, rows in pieces],
        )


def _pieces(segments: Segments) -> list[tuple[slice, slice]]:
    """Steps and rows of each segment, or those of all where they are whole rows."""
    if segments.whole_rows:
        return [(slice(0, segments.length), slice(0, segments.batch))]
    return [(segment.steps, slice(segment.row, segment.row + 1)) for segment in segments]


def _run(z: Tensor, pieces: list[tuple[slice, slice]]) -> None:
    """Sums of each segment's steps up to each step, in place of z [length, batch, ...]."""
    for steps, rows in pieces:
        part = z[steps, rows]
        whole = len(part) - len(part) % STEPS
        part[whole:].cumsum_(0)
        if whole:
            blocks = part[:whole].unflatten(0, (-1, STEPS))
            blocks.cumsum_(1)
            blocks[1:] += blocks[:-1, -1].cumsum(0)[:, None]
            part[whole:] += part[whole - 1]


def _shift(first: Tensor, mean_in: Tensor | None, tables: _Tables) -> Tensor:
    """A number near each segment's data: the mean before it, or of its first step; [S, G]."""
    if mean_in is None:
        return first
    return torch.where(tables.position > 0, mean_in.double(), first)


def _moments(x: Tensor, groups: int, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean less a shift, and population variance, of each step's groups: float64 [..., G].

    The mean is taken twice, so that what it is off by is small beside the group's own deviation: a
    compiled sum in float64 would take as long as all the rest.
    """
    wide = x.to(compute_dtype(x)).unflatten(-1, (groups, -1))
    rough = wide.mean(-1)
    centred = wide - rough[..., None]
    rest = centred.mean(-1).double()
    return rough - shift + rest, centred.square().mean(-1).double() - rest * rest


@compiled
def _sums(x: Tensor, shifts: Tensor, groups: int) -> Tensor:
    """Each step's (x - shift) and (x - shift)^2, over its scalars; [length, batch, 2, G]."""
    mean, var = _moments(x, groups, shifts)
    return torch.stack((mean, var + mean * mean), 2)


@compiled
def _normalized(
    x: Tensor,
    sums: Tensor,
    shifts: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and var that it is normalized by, from the sums up to each step."""
    dtype = compute_dtype(x)
    first, second = (sums / count[..., None]).unbind(2)
    mean = first + shifts
    var = (second - first * first).clamp_min(0.0).to(dtype)
    normed = _normed(x, mean, var, eps)[0]
    y = normed.flatten(2) * (weight.to(dtype) + 1) + bias.to(dtype)
    return y.to(x.dtype), mean, var


def _normed(
    x: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x normalized and x less the rounded mean [..., G, D/G]; that mean and 1 / deviation."""
    high = mean.to(var.dtype)
    rstd = (var + eps).rsqrt()
    low = (mean - high).to(var.dtype) * rstd
    centred = x.to(var.dtype).unflatten(-1, (mean.shape[-1], -1)) - high[..., None]
    return centred * rstd[..., None] - low[..., None], centred, high, rstd


@compiled
def _terms(
    x: Tensor,
    grad_y: Tensor,
    mean: Tensor,
    var: Tensor,
    shifts: Tensor,
    count: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """a and v of each step [length, batch, 2, G], the last first; gradients of weight and bias."""
    normed, _, _, rstd = _normed(x, mean, var, eps)
    grad = grad_y.to(var.dtype)
    gained = (grad * (weight.to(var.dtype) + 1)).view_as(normed)
    to_mean = -gained.sum(-1) * rstd
    to_var = -0.5 * (gained * normed).sum(-1) * rstd * rstd
    v = to_var.double() / count
    a = to_mean.double() / count - 2 * (mean - shifts) * v
    terms = torch.stack((a, v), 2).flip(0)
    return terms, (grad * normed.flatten(2)).sum((0, 1)), grad.sum((0, 1))


@compiled
def _input_gradient(
    x: Tensor,
    grad_y: Tensor,
    mean: Tensor,
    var: Tensor,
    shifts: Tensor,
    terms: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """The gradient of x, from the sums of a and v over each step and those after it."""
    dtype = var.dtype
    _, centred, high, rstd = _normed(x, mean, var, eps)
    gained = (grad_y.to(dtype) * (weight.to(dtype) + 1)).view_as(centred)
    a, v = (terms.flip(0) / centred.shape[-1]).unbind(2)
    slope = 2 * v
    constant = a + slope * (high - shifts)
    grad = gained * rstd[..., None] + centred * slope.to(dtype)[..., None]
    return (grad + constant.to(dtype)[..., None]).flatten(2).to(x.dtype)


def _statistics(x: Tensor, groups: int, segments: Segments) -> tuple[Tensor, Tensor]:
    found = [_moments_of_all(x[piece], groups) for piece in _pieces(segments)]
    means, variances = zip(*found, strict=True)
    return torch.cat(means), torch.cat(variances)


@compiled
def _moments_of_all(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance over all steps, float64 [batch, G]."""
    step_mean, step_var = _moments(x, groups)
    mean = step_mean.mean(0)
    return mean, ((step_mean - mean).square() + step_var).mean(0)


def _spread(x: Tensor, mean: Tensor, slope: Tensor, constant: Tensor, segments: Segments) -> Tensor:
    grad_x = torch.zeros_like(x)
    pieces = _pieces(segments)
    numbers = [slice(i, i + len(segments) // len(pieces)) for i in range(len(pieces))]
    for piece, number in zip(pieces, numbers, strict=True):
        grad_x[piece] = _line(x[piece], mean[number], slope[number], constant[number])
    return grad_x


@compiled
def _line(x: Tensor, mean: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    high = mean.to(dtype)
    constant = (constant - slope * (mean - high)).to(dtype)[..., None]
    centred = x.to(dtype).unflatten(-1, (mean.shape[-1], -1)) - high[..., None]
    return (centred * slope.to(dtype)[..., None] + constant).flatten(2).to(x.dtype)


PATH = Path(_forward, _backward, _statistics, _spread)
