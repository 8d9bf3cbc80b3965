"""The operators that have Triton kernels, at the sizes of real layers: one entry each.

A new kernel gets its rows in kernel_traffic.py and tests/gpu.sh by an entry in OPERATORS; VARIANTS
are the same operators as a stream, packed rows or a dropout call them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from megalodon_mcore.kernels.cema import cema, cema_summary
from megalodon_mcore.kernels.chunked_attention import AttentionState, chunked_attention
from megalodon_mcore.kernels.gates import gated_silu, swiglu
from megalodon_mcore.kernels.query_key import query_key
from megalodon_mcore.kernels.row_norm import layer_norm, rms_norm
from megalodon_mcore.kernels.segments import Segments
from megalodon_mcore.kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm,
    timestep_statistics,
)
from torch import Tensor

from megalodon_mcore.sizes import SIZES as NAMED_SIZES

NDIM = 16
EPS = 1e-5


class Shape(NamedTuple):
    """Of a layer's input and of its parts, by the names of megalodon_mcore/config.py."""

    batch: int
    length: int
    channels: int
    groups: int
    heads: int
    key_width: int
    value_width: int
    chunk: int
    ffn: int

    @classmethod
    def named(cls, name: str, length: int = 16384, batch: int = 1) -> Shape:
        """That of a named size."""
        size = NAMED_SIZES[name]
        return cls(
            batch,
            length,
            size.hidden_size,
            size.norm_num_groups,
            size.num_heads,
            size.head_dim,
            size.value_dim // size.num_heads,
            size.chunk_size,
            size.ffn_hidden_size,
        )

    def divided(self, by: int) -> Shape:
        """A part of the width, as if the rest were on other machines: same groups, same heads."""
        return self._replace(
            channels=self.channels // by,
            groups=self.groups // by,
            heads=max(1, self.heads // by),
        )

    @property
    def elements(self) -> int:
        """Scalars in a layer's input."""
        return self.batch * self.length * self.channels


SIZES = {name: Shape.named(name) for name in NAMED_SIZES}
SIZES["tiny"] = Shape(2, 96, 64, 4, 2, 16, 32, 32, 96)


class Operator(NamedTuple):
    """An operator and what its gradient is taken of.

    inputs: leaves for a shape, a type and a device. run: a shape and the leaves to the outputs.
    flops: forward and backward flops that the mathematics asks for. sliced: along what it does the
    same again and again: channels, length, chunk or heads.
    """

    inputs: Callable[[Shape, torch.dtype, torch.device], list[Tensor]]
    run: Callable[..., tuple[Tensor, ...]]
    flops: Callable[[Shape], tuple[float, float]]
    memory_bound: bool
    sliced: str

    def last(self, shape: Shape, share: int) -> tuple[Shape, Callable[[Tensor], Tensor]]:
        """The last `share`-th of a problem, a problem of its own, and what cuts it out of a tensor.

        Channels, with their groups and parameters. Of what has a length: the last whole chunk and
        what follows it, whatever `share` is; parameters stay whole.
        """
        if self.sliced == "channels":
            part = shape.divided(share)

            def cut(z: Tensor) -> Tensor:
                if z.shape[0] == shape.channels:
                    return z[-part.channels :]
                return z[..., -(part.channels if z.shape[-1] == shape.channels else part.groups) :]

            return part, cut
        first = max(0, (shape.length - 1) // shape.chunk - 1) * shape.chunk
        part = shape._replace(length=shape.length - first)
        steps = (shape.length, shape.batch)
        return part, lambda z: z[first:] if z.shape[:2] == steps else z


@lru_cache
def documents(shape: Shape) -> Segments:
    """Rows of up to 64 documents of rising lengths, which are 16 steps or more on average."""
    count = max(2, min(64, shape.length // 16))
    bounds = sorted({shape.length * i * i // count**2 for i in range(count + 1)})
    return Segments.of_documents([bounds] * shape.batch)


def norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, and the float32 weight and bias."""
    x = torch.randn(shape.length, shape.batch, shape.channels, device=device, dtype=dtype)
    return _leaves(x, *torch.randn(2, shape.channels, device=device, dtype=_state_type(dtype)))


def run_norm(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, segments: Segments | None = None
) -> tuple[Tensor]:
    """TimestepNorm of whole documents, each a row unless segments say otherwise."""
    return (timestep_norm(x, weight, bias, shape.groups, EPS, segments)[0],)


def norm_stream_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What norm_inputs gives, and mean and variance of what came before."""
    mean, var = torch.randn(2, shape.batch, shape.groups, device=device, dtype=_state_type(dtype))
    return [*norm_inputs(shape, dtype, device), *_leaves(mean, var.abs() + 0.5)]


def run_norm_stream(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """TimestepNorm after 7 steps; y, mean and var."""
    segments = Segments.of_rows(shape.length, shape.batch, 7)
    state = TimestepNormState(mean, var)
    y, after = timestep_norm(x, weight, bias, shape.groups, EPS, segments, state, True)
    return y, after.mean, after.var


def statistics_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x alone."""
    return norm_inputs(shape, dtype, device)[:1]


def cema_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, and the float32 alpha, delta, theta, gamma and omega."""
    channels = shape.channels
    x = torch.randn(shape.length, shape.batch, channels, device=device, dtype=dtype)
    shapes = ((channels, NDIM, 1), (channels, NDIM, 1), (channels, 1, 1), (channels, NDIM, 2))
    real = _state_type(dtype)
    return _leaves(
        x, *(torch.randn(*s, device=device, dtype=real) for s in (*shapes, (channels, 1)))
    )


def cema_stream_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What cema_inputs gives and a complex state."""
    state = torch.randn(
        *(shape.batch, shape.channels, NDIM), dtype=_state_type(dtype).to_complex(), device=device
    )
    return [*cema_inputs(shape, dtype, device), *_leaves(state)]


def run_cema(shape: Shape, x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    """CEMA without a state."""
    return (cema(x, *parameters)[0],)


def run_cema_stream(shape: Shape, *leaves: Tensor) -> tuple[Tensor, ...]:
    """CEMA of documents that began before x; y and the state after them."""
    *given, state = leaves
    return cema(*given, Segments.of_rows(shape.length, shape.batch, 7), state, True)


def run_cema_packed(shape: Shape, x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    """CEMA of rows that are packed with documents."""
    return (cema(x, *parameters, documents(shape))[0],)


def cema_flops(shape: Shape) -> tuple[float, float]:
    """Of the recurrence a step at a time: h = q h + p x, Re(gamma h), omega x."""
    forward = (12 * NDIM + 2) * shape.elements
    return forward, 2 * forward


def cema_summary_flops(shape: Shape) -> tuple[float, float]:
    """Of the recurrence alone: h = q h + p x; backward the same, time reversed."""
    flops = 8 * NDIM * shape.elements
    return flops, flops


def attention_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q and k of the size that norms give them, and v."""
    steps = (shape.length, shape.batch, shape.heads)
    widths = (shape.key_width, shape.key_width, shape.value_width)
    q, k, v = (torch.randn(*steps, width, device=device) for width in widths)
    scale = shape.key_width**-0.25
    return _leaves(*(z.to(dtype) for z in (q * scale, k * scale, v)))


def attention_stream(shape: Shape) -> Segments:
    """Rows that go on 37 steps after a chunk's start, or in a smaller chunk at its last."""
    return Segments.of_rows(shape.length, shape.batch, min(37, shape.chunk - 1))


def attention_stream_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What attention_inputs gives, and keys and values of the chunks that rows go on with."""
    begun = attention_stream(shape).begun(shape.chunk)
    state = attention_inputs(shape._replace(batch=1, length=begun), dtype, device)[1:]
    return [*attention_inputs(shape, dtype, device), *_leaves(*(z[:, 0] for z in state))]


def run_attention_stream(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Chunked causal attention that goes on with chunks; the output and the new state."""
    segments, state = attention_stream(shape), AttentionState(key, value)
    out, after = chunked_attention(q, k, v, shape.chunk, segments, state, return_state=True)
    return out, *after


def run_attention(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None
) -> tuple[Tensor]:
    """Chunked causal attention of whole documents, each a row unless segments say otherwise."""
    return (chunked_attention(q, k, v, shape.chunk, segments)[0],)


def attention_flops(shape: Shape, segments: Segments | None = None) -> tuple[float, float]:
    """Of the products on and below the diagonal: 2 forward; backward 5, the scores taken anew."""
    segments = segments or Segments.of_rows(shape.length, shape.batch)
    parts = segments.chunk_parts(shape.chunk)
    pairs = sum(part.length * (part.before + (part.length + 1) / 2) for part in parts)
    pairs *= 2 * shape.heads
    key_width, value_width = shape.key_width, shape.value_width
    return pairs * (key_width + value_width), pairs * (3 * key_width + 2 * value_width)


def rms_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What CEMA gives, and the float32 weight."""
    x = torch.randn(shape.length, shape.batch, shape.channels, device=device, dtype=dtype)
    return _leaves(x, torch.randn(shape.channels, device=device, dtype=_state_type(dtype)))


def query_key_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """z, and the float32 weight and bias of queries and keys."""
    size = (shape.length, shape.batch, shape.heads, shape.key_width)
    z = torch.randn(size, device=device, dtype=dtype)
    parameters = torch.randn(
        2, 2, shape.heads * shape.key_width, device=device, dtype=_state_type(dtype)
    )
    return _leaves(z, *parameters)


def run_query_key(
    shape: Shape, z: Tensor, weight: Tensor, bias: Tensor, segments: Segments | None = None
) -> tuple[Tensor, ...]:
    """Of whole documents, each a row unless segments say otherwise."""
    return query_key(z, weight, bias, EPS, 1e4, shape.chunk, segments)


def gate_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The gate, and what attention gives."""
    size = (2, shape.length, shape.batch, shape.heads * shape.value_width)
    return _leaves(*torch.randn(size, device=device, dtype=dtype))


def swiglu_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What the FFN's first product gives, gate and x side by side."""
    size = (shape.length, shape.batch, 2 * shape.ffn)
    return _leaves(torch.randn(size, device=device, dtype=dtype))


def elementwise_flops(
    each: int, columns: Callable[[Shape], int] = lambda shape: shape.channels
) -> Callable[[Shape], tuple[float, float]]:
    """So many for every scalar, twice as many backward."""

    def flops(shape: Shape) -> tuple[float, float]:
        forward = each * shape.batch * shape.length * columns(shape)
        return forward, 2 * forward

    return flops


OPERATORS = {
    "TimestepNorm": Operator(norm_inputs, run_norm, elementwise_flops(8), True, "channels"),
    "timestep statistics": Operator(
        statistics_inputs,
        lambda shape, x: timestep_statistics(x, shape.groups),
        elementwise_flops(4),
        True,
        "channels",
    ),
    "CEMA": Operator(cema_inputs, run_cema, cema_flops, True, "channels"),
    "RMSNorm": Operator(
        rms_norm_inputs,
        lambda shape, x, weight: (rms_norm(x, weight, EPS),),
        elementwise_flops(4),
        True,
        "length",
    ),
    "LayerNorm": Operator(
        norm_inputs,
        lambda shape, x, weight, bias: (layer_norm(x, weight, bias, EPS),),
        elementwise_flops(6),
        True,
        "length",
    ),
    "query and key": Operator(
        query_key_inputs,
        run_query_key,
        elementwise_flops(13, lambda shape: shape.heads * shape.key_width),
        True,
        "length",
    ),
    "attention": Operator(attention_inputs, run_attention, attention_flops, False, "chunk"),
    "gate": Operator(
        gate_inputs,
        lambda shape, gate, x: (gated_silu(gate, x),),
        elementwise_flops(5, lambda shape: shape.heads * shape.value_width),
        True,
        "length",
    ),
    "SwiGLU": Operator(
        swiglu_inputs,
        lambda shape, hidden: (swiglu(hidden),),
        elementwise_flops(5, lambda shape: shape.ffn),
        True,
        "length",
    ),
}


VARIANTS = {
    "TimestepNorm, stream": Operator(
        norm_stream_inputs, run_norm_stream, elementwise_flops(8), True, "channels"
    ),
    "TimestepNorm, packed": Operator(
        norm_inputs,
        lambda shape, *leaves: run_norm(shape, *leaves, documents(shape)),
        elementwise_flops(8),
        True,
        "channels",
    ),
    "CEMA, stream": Operator(cema_stream_inputs, run_cema_stream, cema_flops, True, "channels"),
    "CEMA, packed": Operator(cema_inputs, run_cema_packed, cema_flops, True, "channels"),
    "CEMA summary": Operator(
        lambda *given: cema_inputs(*given)[:4],
        lambda shape, *leaves: (cema_summary(*leaves),),
        cema_summary_flops,
        True,
        "channels",
    ),
    "attention, stream": Operator(
        attention_stream_inputs,
        run_attention_stream,
        lambda shape: attention_flops(shape, attention_stream(shape)),
        False,
        "chunk",
    ),
    "attention, packed": Operator(
        attention_inputs,
        lambda shape, *leaves: run_attention(shape, *leaves, documents(shape)),
        lambda shape: attention_flops(shape, documents(shape)),
        False,
        "heads",
    ),
    "query and key, packed": Operator(
        query_key_inputs,
        lambda shape, *leaves: run_query_key(shape, *leaves, documents(shape)),
        elementwise_flops(13, lambda shape: shape.heads * shape.key_width),
        True,
        "length",
    ),
    "query and key, in a chunk": Operator(
        query_key_inputs,
        lambda shape, *leaves: run_query_key(
            shape, *leaves, Segments.of_rows(shape.length, shape.batch, shape.chunk // 3)
        ),
        elementwise_flops(13, lambda shape: shape.heads * shape.key_width),
        True,
        "length",
    ),
}

# Whose results are drawn at random.
DROPOUT = Operator(
    attention_inputs,
    lambda shape, q, k, v: chunked_attention(q, k, v, shape.chunk, dropout_p=0.1)[:1],
    attention_flops,
    False,
    "chunk",
)


def _state_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]
