"""Bytes and flops of the Triton kernels, counted in their interpreter, beside what is needed.

    python examples/benchmarks/kernel_traffic.py

Needs minutes, but no GPU. Every load and store of every program is seen: `moved` adds up the
bytes of its active lanes (a second read counts, whatever cache might serve it), `distinct` the
32-byte sectors that a kernel touches, once a launch each, which is what memory gives if the caches
miss nothing twice. Reads and writes of torch's own operations around the kernels are counted as
moved. The floor is every input once and every output once; backward's inputs are forward's and the
gradients that come in. Flops are those of tl.dot beside the flops that the mathematics asks for.

The kernels treat channels alike (or heads, or stretches of time), so a slice is run, with as many
programs wished for as its share, and multiplied: bytes are exactly those of the whole, but
`distinct` counts again what slices of the length share. One chunk of attention stands for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Triton reads it when it is imported. Who imports this file chooses for itself.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MEGALODON_KERNELS"] = "triton"

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from operators import OPERATORS, SIZES, VARIANTS, Operator, Shape

EVERY = OPERATORS | VARIANTS
SECTOR = 32
# Channels that are run, or their share of the length: a slice with whole groups.
SLICE = 64


@dataclass
class Kernel:
    """What one kernel did in one direction, over all its launches."""

    moved: float = 0
    distinct: float = 0
    flops: float = 0


@dataclass
class Count:
    """What one direction of an operator did, and the least it could do."""

    floor: float = 0
    needed: float = 0
    kernels: dict[str, Kernel] = field(default_factory=lambda: defaultdict(Kernel))

    @property
    def moved(self) -> float:
        """Bytes of all loads and stores."""
        return sum(kernel.moved for kernel in self.kernels.values())

    @property
    def distinct(self) -> float:
        """Bytes of the sectors that each launch touches."""
        return sum(kernel.distinct for kernel in self.kernels.values())

    @property
    def flops(self) -> float:
        """Flops of tensor-core products."""
        return sum(kernel.flops for kernel in self.kernels.values())

    def times(self, factor: int) -> Count:
        """Of so many slices."""
        kernels = {
            name: Kernel(factor * k.moved, factor * k.distinct, factor * k.flops)
            for name, k in self.kernels.items()
        }
        return Count(factor * self.floor, factor * self.needed, kernels)


class _TorchBytes(TorchDispatchMode):
    """Adds what torch's operations read and write to a kernel of that name."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.kernel = count.kernels["torch around them"]
        self.inside_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        given = [z for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor)]
        made = [z for z in tree_leaves(out) if isinstance(z, torch.Tensor)]
        storages = {z.untyped_storage().data_ptr() for z in given}
        is_view = all(z.untyped_storage().data_ptr() in storages for z in made)
        writes = func._schema.is_mutable
        if not self.inside_kernel and "empty" not in func.__name__ and (writes or not is_view):
            size = sum(_distinct_bytes(z) for z in {id(z): z for z in [*given, *made]}.values())
            self.kernel.moved += size
            self.kernel.distinct += size
        return out


def _distinct_bytes(tensor: torch.Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * int(np.prod([size for size, step in sizes if step]))


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Counts all that is launched meanwhile. Products give zeros: nothing here asks for values."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    launch = interpreter.GridExecutor.__call__
    torch_bytes = _TorchBytes(count)
    kernel = [Kernel()]
    sectors: list[np.ndarray] = []

    def access(pointers, mask) -> None:  # noqa: ANN001
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        kernel[0].moved += active.size * size
        sectors.append(np.unique(active // SECTOR))

    def counted_load(self, pointers, mask, *others):  # noqa: ANN001, ANN002, ANN202
        access(pointers, mask)
        return load(self, pointers, mask, *others)

    def counted_store(self, pointers, value, mask, *others):  # noqa: ANN001, ANN002, ANN202
        access(pointers, mask)
        return store(self, pointers, value, mask, *others)

    def counted_dot(self, a, b, d, *others):  # noqa: ANN001, ANN002, ANN202
        *batch, rows, inner = a.data.shape
        kernel[0].flops += 2 * int(np.prod(batch)) * rows * inner * b.data.shape[-1]
        return interpreter.TensorHandle(np.zeros_like(d.data), d.dtype.scalar)

    def counted_launch(self, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        kernel[0] = count.kernels[self.fn.__name__]
        torch_bytes.inside_kernel = True
        result = launch(self, *args, **kwargs)
        torch_bytes.inside_kernel = False
        kernel[0].distinct += SECTOR * np.unique(np.concatenate(sectors)).size
        sectors.clear()
        return result

    with (
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(builder, "create_dot", counted_dot),
        patch.object(interpreter.GridExecutor, "__call__", counted_launch),
        np.errstate(all="ignore"),
        torch_bytes,
    ):
        yield


def measure(operator: Operator, shape: Shape, dtype: torch.dtype) -> dict[str, Count]:
    """Forward's and backward's counts of an operator at a shape."""
    leaves = operator.inputs(shape, dtype, torch.device("cpu"))
    forward, backward = Count(), Count()
    forward.needed, backward.needed = operator.flops(shape)
    if operator.sliced != "channels":
        # Tables that are kept from call to call are made once, not once a slice.
        operator.run(shape, *leaves)
    with counting(forward):
        outputs = operator.run(shape, *leaves)
    upstream = [torch.ones_like(out) for out in outputs]
    with counting(backward):
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    forward.floor = _bytes(leaves, outputs)
    backward.floor = _bytes(leaves, upstream, gradients)
    return {"forward": forward, "backward": backward}


def _bytes(*groups: Any) -> int:
    return sum(z.numel() * z.element_size() for group in groups for z in group)


def sliced(name: str, shape: Shape, dtype: torch.dtype, by: int) -> dict[str, Count]:
    """The counts at a shape, from a `by`-th of its width."""
    from megalodon_mcore.kernels.cema import triton as cema_kernels
    from megalodon_mcore.kernels.query_key import triton as query_key_kernels
    from megalodon_mcore.kernels.row_norm import triton as row_norm_kernels
    from megalodon_mcore.kernels.timestep_norm import triton as norm_kernels

    operator = EVERY[name]
    if operator.sliced == "chunk":
        # Chunks and heads are independent.
        one = shape._replace(batch=1, length=shape.chunk, heads=1)
        factor = shape.batch * shape.heads * shape.length // shape.chunk
    elif operator.sliced == "heads":
        one, factor = shape._replace(batch=1, heads=1), shape.batch * shape.heads
    elif operator.sliced == "length":
        one, factor = shape._replace(length=shape.length // by), by
    else:
        one, factor = shape.divided(by), by
    with ExitStack() as stack:
        for kernels in (cema_kernels, norm_kernels, query_key_kernels, row_norm_kernels):
            stack.enter_context(patch.object(kernels, "PROGRAMS", kernels.PROGRAMS // by))
        counts = measure(operator, one, dtype)
    return {direction: count.times(factor) for direction, count in counts.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["200m", "7b-paper"])
    parser.add_argument("--only", nargs="+", choices=list(EVERY), default=list(OPERATORS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", action="store_true", help="A row for every kernel as well.")
    parser.add_argument(
        "--card",
        nargs=2,
        type=float,
        default=(3.35e12, 989e12),
        metavar=("BYTES/S", "FLOP/S"),
        help="Peaks for the last column (those that NVIDIA gives for an H100 SXM, bfloat16).",
    )
    args = parser.parse_args()
    print(f"command: {' '.join(sys.argv)}\n")
    print(
        f"{'':<40} {'moved':>10} {'floor':>10} {'ratio':>6} {'distinct':>9} "
        f"{'flops':>9} {'needed':>9} {'ratio':>6} {'bound':>7}"
    )
    for size in args.size:
        shape = SIZES[size]._replace(batch=args.batch, length=args.length)
        for name in args.only:
            counts = sliced(name, shape, getattr(torch, args.dtype), shape.channels // SLICE)
            for direction, count in counts.items():
                print(row(f"{size} {name} {direction}", count, args.card), flush=True)
                if args.kernels:
                    for kernel, part in count.kernels.items():
                        moved, distinct = part.moved / count.floor, part.distinct / count.floor
                        print(f"    {kernel:<36} {'':>21} {moved:>6.2f} {distinct:>9.2f}")
    print(
        "\nMiB and Gflop. ratio: moved / floor, flops / needed. distinct: sectors touched / floor."
        "\nbound: the time that distinct bytes and products need at the card's peaks, over the time"
        "\nthat floor and needed flops do. Unmeasured on a GPU."
    )


def row(label: str, count: Count, card: tuple[float, float]) -> str:
    """A line of the table, bytes in MiB and flops in 10^9."""
    bandwidth, peak = card
    best = max(count.floor / bandwidth, count.needed / peak)
    bound = max(count.distinct / bandwidth, count.flops / peak) / best
    return (
        f"{label:<40} {count.moved / 2**20:>10.1f} {count.floor / 2**20:>10.1f} "
        f"{count.moved / count.floor:>6.2f} {count.distinct / count.floor:>9.2f} "
        f"{count.flops / 1e9:>9.1f} {count.needed / 1e9:>9.1f} "
        f"{count.flops / count.needed:>6.2f} {bound:>7.2f}"
    )


if __name__ == "__main__":
    main()
