"""Every operator with a Triton kernel, and a whole layer, on a GPU beside its peers.

    python examples/benchmarks/gpu.py

Takes under 8 minutes and nobody's attention: what fails, or takes longer than its share, becomes a
row that says so. Measures the card's copy bandwidth and GEMM peak first; the last columns are
shares of those: of the bytes of inputs and outputs, once each, and of the flops that the
mathematics asks for. `difference` is the largest one to the portable path, over outputs and
gradients, relative to the largest value of each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import peers
from measure import median_seconds
from operators import OPERATORS, SIZES, Operator, Shape

LAYER = "layer"
PORTABLE, COMPILED, KERNELS = "portable torch", "portable, torch.compile", "Triton kernels"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all cases, prints a line for each and writes them as JSON; returns them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["200m", "7b"])
    parser.add_argument("--only", nargs="+", choices=[*OPERATORS, LAYER])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--length", type=int, help="Tokens of the one sequence (16384).")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.5, help="Spent on each timing (0.5).")
    parser.add_argument("--minutes", type=float, default=7.5, help="Spent on everything (7.5).")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device is cuda, but torch finds no CUDA device; run this where there is one, or try "
            "the script with --device cpu --size tiny."
        )
    if args.case:
        print(json.dumps(case(args, *args.case.split("/"))))
        return []
    deadline = time.monotonic() + 60 * args.minutes
    bandwidth, peak = ceilings(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}: copies {bandwidth / 1e9:,.0f} GB/s, multiplies {peak / 1e12:,.2f} Tflop/s\n")
    print(
        f"{'':<46} {'forward':>9} {'+backward':>9} {'ratio':>6} "
        f"{'bytes':>6} {'flops':>6} {'difference':>10}"
    )
    cases = [f"{size}/{what}" for size in args.size for what in args.only or [*OPERATORS, LAYER]]
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(cases):
        share = (deadline - time.monotonic()) / (len(cases) - index)
        for row in attempt(args, label, share):
            row["bytes_share"] = row["floor"] / row["seconds"] / bandwidth if row["seconds"] else 0
            row["flops_share"] = row["needed"] / row["seconds"] / peak if row["seconds"] else 0
            rows.append(row)
            print(line(row), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    result = {"device": name, "bandwidth": bandwidth, "gemm_peak": peak, "rows": rows}
    (args.output / "results.json").write_text(json.dumps(result, indent=2))
    return rows


def attempt(args: argparse.Namespace, label: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case; on a GPU a process of its own runs it, so that a fault ends no other."""
    if args.device == "cpu":
        return case(args, *label.split("/"))
    command = [sys.executable, __file__, "--case", label, "--dtype", args.dtype]
    command += ["--seconds", str(args.seconds)]
    command += ["--length", str(args.length)] if args.length else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, seconds))
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        problem = f"not done after its share of the time, {seconds:.0f} s"
    return [failed(label, "", problem)]


def failed(label: str, way: str, problem: str) -> dict[str, Any]:
    """A row of something that did not run."""
    row = {"case": label, "way": way, "forward": 0, "seconds": 0, "ratio": 0}
    return row | {"floor": 0, "needed": 0, "difference": None, "problem": problem[:160]}


def case(args: argparse.Namespace, size: str, what: str) -> list[dict[str, Any]]:
    """Times all ways to compute one thing. The ratio is a way's time over the kernels'."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = SIZES[size]
    if args.length:
        shape = shape._replace(length=args.length)
    label = f"{size} {what}"
    torch.manual_seed(0)
    try:
        if what == LAYER:
            operator = layer(shape)
        else:
            operator = OPERATORS[what]
        leaves = operator.inputs(shape, dtype, device)
    except Exception as error:  # whatever it is, the other cases go on
        return [failed(label, "inputs", repr(error))]
    rows, reference = [], None
    for way, run in ways(args, what, operator, shape).items():
        os.environ["MEGALODON_KERNELS"] = "" if way == KERNELS else "torch"
        try:
            outputs = run(*leaves)
            upstream = [torch.ones_like(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, leaves, upstream)
            values = [*outputs, *gradients]
            reference = values if way == PORTABLE else reference
            floor = size_of(leaves, leaves, upstream, gradients, outputs)
            row = failed(label, way, "") | {"floor": floor, "needed": sum(operator.flops(shape))}
            row["difference"] = difference(values, reference) if reference else None
            row["forward"] = timed(args, lambda run=run: run(*leaves))
            row["seconds"] = timed(
                args,
                lambda run=run, upstream=upstream: torch.autograd.grad(
                    run(*leaves), leaves, upstream
                ),
            )
            rows.append(row)
        except Exception as error:  # the other ways go on
            rows.append(failed(label, way, repr(error).splitlines()[0]))
    ours = next((row["seconds"] for row in rows if row["way"] == KERNELS), 0)
    for row in rows:
        row["ratio"] = row["seconds"] / ours if ours else 0
    return rows


def ways(
    args: argparse.Namespace, what: str, operator: Operator, shape: Shape
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The ways to compute an operator on this device, the portable path first."""

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return operator.run(shape, *leaves)

    found = {PORTABLE: run}
    if args.device == "cuda":
        found |= {KERNELS: run, COMPILED: torch.compile(run)}
    if what == "CEMA":
        found["plain FFT"] = lambda x, *parameters: (
            peers.cema_by_fft(x.float(), *parameters).to(x.dtype),
        )
    if what == "attention":
        found["SDPA on split heads"] = lambda q, k, v: (
            peers.attention_by_split_heads(q, k, v, shape.chunk),
        )
    return found


def layer(shape: Shape) -> Operator:
    """One of the model's layers as Megatron builds it; its parameters count as inputs."""
    import models

    groups = models.megatron()
    groups.__enter__()
    heads, key_width, value_width = shape.heads, shape.key_width, shape.value_width
    sizes = models.SIZES | {
        "layers": 1,
        "hidden_size": shape.channels,
        "heads": heads,
        "z_dim": heads * key_width,
        "value_dim": heads * value_width,
        "ffn": shape.ffn,
        "chunk": shape.chunk,
        "groups": shape.groups,
    }
    built = []

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        model = models.megalodon(dtype, sizes).to(dtype)
        module = (model if device.type == "cpu" else model.cuda()).decoder.layers[0]
        built.append(module)
        x = torch.randn(shape.length, shape.batch, shape.channels, device=device, dtype=dtype)
        return [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]

    def run(shape: Shape, x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
        out = built[-1](x, attention_mask=None)
        return (out[0] if isinstance(out, tuple) else out,)

    def flops(shape: Shape) -> tuple[float, float]:
        d, z, e = shape.channels, heads * key_width, heads * value_width
        products = d * z + 2 * d * e + (d + e) * d + 2 * d * shape.ffn
        forward = shape.batch * shape.length * (2 * products + (z + e) * (shape.chunk + 1))
        return forward, 2 * forward

    return Operator(inputs, run, flops, False)


def size_of(*groups: Any) -> int:  # noqa: ANN401
    """Bytes of lists of tensors."""
    return sum(z.numel() * z.element_size() for group in groups for z in group)


def difference(values: list[Tensor], reference: list[Tensor]) -> float:
    """Largest difference, each tensor's relative to its largest value."""
    worst = 0.0
    for value, wanted in zip(values, reference, strict=True):
        value, wanted = value.detach(), wanted.detach()
        scale = wanted.abs().max().double().clamp_min(1e-30)
        worst = max(worst, float((value.double() - wanted.double()).abs().max() / scale))
    return worst


def timed(args: argparse.Namespace, function: Callable[[], object]) -> float:
    """Median seconds of a call; on a GPU between two waits for it, with its caches overwritten."""
    if args.device == "cpu":
        return median_seconds(function, args.seconds)
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    function()
    times: list[float] = []
    end = time.perf_counter() + args.seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def ceilings(args: argparse.Namespace) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written) and flop/s of a large matrix product."""
    small = args.device == "cpu"
    size, side = (1 << 22, 256) if small else (1 << 30, 8192)
    source = torch.ones(size, dtype=torch.int8, device=args.device)
    target = torch.empty_like(source)
    copying = timed(args, lambda: target.copy_(source))
    a, b = torch.randn(2, side, side, device=args.device).to(getattr(torch, args.dtype))
    return 2 * size / copying, 2 * side**3 / timed(args, lambda: a @ b)


def line(row: dict[str, Any]) -> str:
    """A row of the table; times in milliseconds."""
    label = f"{row['case']}: {row['way']}"
    if row["problem"]:
        return f"{label:<46} FAILED: {row['problem']}"
    error = "" if row["difference"] is None else f"{row['difference']:.1e}"
    return (
        f"{label:<46} {1e3 * row['forward']:>9.3f} {1e3 * row['seconds']:>9.3f} "
        f"{row['ratio']:>6.2f} {row['bytes_share']:>6.0%} {row['flops_share']:>6.0%} {error:>10}"
    )


if __name__ == "__main__":
    main()
