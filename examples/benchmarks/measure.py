"""Medians of repeated runs, this machine's own ceilings, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_seconds(function: Callable[[], object], seconds: float = 3.0, most: int = 50) -> float:
    """The median time of a call, over as many calls as fit into `seconds` (3 at least).

    Before, it is called for as long unmeasured: an allocator needs some calls to settle.
    """
    end = time.perf_counter() + seconds
    function()
    while time.perf_counter() < end:
        function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cema_inputs(batch: int, length: int, channels: int = 1024) -> tuple:
    """x [length, batch, channels] and CEMA's parameters with 16 dimensions, all leaves."""
    x = torch.randn(length, batch, channels, requires_grad=True)
    shapes = ((channels, 16, 1), (channels, 16, 1), (channels, 1, 1), (channels, 16, 2))
    parameters = [torch.randn(*shape, requires_grad=True) for shape in (*shapes, (channels, 1))]
    return x, parameters


def backward_of(function: Callable[[], torch.Tensor], x: torch.Tensor) -> Callable[[], None]:
    """A forward and backward pass that keeps no gradients."""
    upstream = torch.randn_like(function())

    def run() -> None:
        function().backward(upstream)
        x.grad = None

    return run


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Flop/s of a square matrix product, the best of several."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = min(median_seconds(lambda: a @ b, seconds=1.0, most=9) for _ in range(3))
    return 2 * size**3 / best


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """How far the process grows while the function runs (Linux)."""
    function()
    gc.collect()
    # Freed memory that the allocator keeps would hide what the next call takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    function()
    return process_bytes("VmHWM") - before


def process_bytes(name: str) -> int:
    """A figure of /proc/self/status, such as VmRSS (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def machine() -> str:
    """Processor, threads and versions, in a line."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    processor = names[0].split(":")[1].strip() if names else platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {torch.get_num_threads()} threads, {versions}"
