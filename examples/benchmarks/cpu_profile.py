"""Where the time of the CPU goes: what stands between cpu.py's figures and its targets.

    python examples/benchmarks/cpu_profile.py

Three tables: the 12M model's step by operator, each timed alone at the model's shapes, in float32
and bfloat16; the matrix products against the GEMM peak; CEMA's fixed cost on short sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from megalodon_mcore.kernels.cema import cema, coefficients
from megalodon_mcore.kernels.cema.maps import block_map

import models
from measure import backward_of, cema_inputs, gemm_peak, machine, median_seconds
from megalodon_mcore.allocator import keep_freed_memory
from operators import OPERATORS, Shape

BATCH = 2
PRODUCTS = "products of the projections"


class Part(NamedTuple):
    """A part of a step: how often it occurs, and a forward and backward pass of one."""

    count: int
    run: Callable[[], object]


def main() -> None:
    """Prints the tables and writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="Of the 12M model's rows (2048).")
    parser.add_argument("--seconds", type=float, default=0.5, help="Spent on each part (0.5).")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(machine(), f"\ncommand: {' '.join(sys.argv)}")
    budget = {dtype: step(args, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print_budget(args.length, budget)
    print_products(args)
    print_cema(args.seconds)
    args.output.mkdir(parents=True, exist_ok=True)
    plot(budget, args.output / "step-by-operator.png")
    print(f"\nwritten: {args.output}/step-by-operator.png")


def step(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a step by part, then of the whole as it is measured."""
    seconds = {
        name: part.count * median_seconds(part.run, args.seconds)
        for name, part in parts(args.length, dtype).items()
    }
    with models.megatron():
        model = models.megalodon(dtype).to(dtype)
        run = models.forward_backward(model, BATCH, args.length)
        return seconds | {"measured": median_seconds(run, 10 * args.seconds, 9)}


def parts(length: int, dtype: torch.dtype) -> dict[str, Part]:
    """All of the 12M model's forward and backward pass, by operator."""
    sizes = models.SIZES
    layers = sizes["layers"]
    shape = Shape(
        *(BATCH, length, sizes["hidden_size"], sizes["groups"], 1),
        *(sizes["z_dim"], sizes["value_dim"], sizes["chunk"], sizes["ffn"]),
    )
    products = [matrix_product(dtype, BATCH * length, *size) for size in projections()]

    def operator(name: str) -> Callable[[], object]:
        inputs = OPERATORS[name].inputs(shape, dtype, torch.device("cpu"))
        upstream = [torch.randn_like(y) for y in OPERATORS[name].run(shape, *inputs)]
        return lambda: torch.autograd.grad(OPERATORS[name].run(shape, *inputs), inputs, upstream)

    def elementwise(function: Callable[..., Tensor], *widths: int) -> Callable[[], object]:
        size = (length, BATCH)
        inputs = [torch.randn(*size, w).to(dtype).requires_grad_() for w in widths]
        upstream = torch.randn_like(function(*inputs))
        return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)

    d, e = sizes["hidden_size"], sizes["value_dim"]
    return {
        PRODUCTS: Part(1, lambda: [product() for product in products]),
        "attention": Part(layers, operator("attention")),
        "CEMA": Part(layers, operator("CEMA")),
        "TimestepNorm": Part(layers + 1, operator("TimestepNorm")),
        "SiLU of the FFN": Part(layers, elementwise(F.silu, sizes["ffn"])),
        "SiLU of the values": Part(layers, elementwise(F.silu, e)),
        "gate": Part(layers, operator("gate")),
        "query and key": Part(layers, operator("query and key")),
        "RMSNorm": Part(layers, operator("RMSNorm")),
        "LayerNorm": Part(layers, operator("LayerNorm")),
        "[mixed, gated] side by side": Part(
            layers, elementwise(lambda a, b: torch.cat([a, b], dim=-1), d, e)
        ),
        "residuals": Part(2 * layers, elementwise(lambda a, b: a + b, d, d)),
        "biases": Part(2 * layers, elementwise(lambda a: a + 1, e)),
    }


def projections() -> list[tuple[int, int]]:
    """Widths in and out of every linear layer of a step, the output layer included."""
    d, z, e, f = (models.SIZES[name] for name in ("hidden_size", "z_dim", "value_dim", "ffn"))
    layer = [(d, z), (d, e), (d, e), (d + e, d), (d, f), (f, d)]
    return models.SIZES["layers"] * layer + [(d, models.SIZES["vocabulary"])]


def matrix_product(dtype: torch.dtype, rows: int, width: int, out: int) -> Callable[[], object]:
    """The three products of a linear layer's forward and backward pass, as Megatron forms them."""
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    grad = torch.randn(rows, out).to(dtype)
    return lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)


def print_budget(length: int, budget: dict[torch.dtype, dict[str, float]]) -> None:
    """A row for every part."""
    single, half = budget[torch.float32], budget[torch.bfloat16]
    whole = single["measured"]
    print(f"\n12M model, {BATCH} rows of {length}, forward and backward, each part alone")
    print(f"{'':<32}{'float32':>11}{'of step':>9}{'bf16':>11}{'float32 / bf16':>16}")

    def row(name: str, a: float, b: float) -> None:
        print(f"{name:<32}{1e3 * a:>8.1f} ms{a / whole:>9.1%}{1e3 * b:>8.1f} ms{a / b:>16.2f}")

    for name in single:
        if name != "measured":
            row(name, single[name], half[name])
    sums = [sum(z.values()) - z["measured"] for z in (single, half)]
    row("sum of the parts", *sums)
    row("the step as measured", whole, half["measured"])


def print_products(args: argparse.Namespace) -> None:
    """Each linear layer's three products, and what share of the peak a step could have at most."""
    peak = gemm_peak(torch.float32)
    rows = BATCH * args.length
    print(
        f"\nproducts of the linear layers, float32, {peak / 1e9:.0f} GFLOP/s at 2048 x 2048 x 2048"
    )
    total = flops = 0.0
    for width, out in dict.fromkeys(projections()):
        seconds = median_seconds(matrix_product(torch.float32, rows, width, out), args.seconds)
        work, count = 6 * rows * width * out, projections().count((width, out))
        total, flops = total + count * seconds, flops + count * work
        print(
            f"{count:>3} x {rows} x {width:>4} x {out:<5}{work / seconds / peak:>8.2f} of the peak"
        )
    print(f"all of them: {flops / total / peak:.2f} of the peak")
    share = models.matrix_flops(BATCH, args.length) / peak / total
    print(f"a step of nothing but these: {share:.2f}, counting the attention's products as free")


def print_cema(seconds: float) -> None:
    """What a sequence of 1,024 steps pays beside its elements."""
    channels, short, long = 256, 1024, 65536
    times = {}
    for length in (short, long):
        x, parameters = cema_inputs(1, length, channels)
        run = backward_of(lambda: cema(x, *parameters)[0], x)  # noqa: B023 - called before it changes
        times[length] = median_seconds(run, 4 * seconds)
    _, (alpha, delta, theta, gamma, omega) = cema_inputs(1, 1, channels)

    def maps() -> Tensor:
        return block_map(*coefficients(alpha, delta, theta), gamma, omega, 16)

    upstream = torch.randn_like(maps())
    # Forward builds the maps, and backward once more with their gradient.
    again = median_seconds(maps, seconds)
    built = again + median_seconds(lambda: maps().backward(upstream), seconds)
    elements = times[long] * short / long
    print(f"\nCEMA, forward and backward, 1 row, {channels} channels, 16 dimensions")
    print(f"L {long}: {1e9 * times[long] / long / channels:.1f} ns an element")
    print(f"L {short}: {1e9 * times[short] / short / channels:.1f} ns an element, of which")
    rest = times[short] - elements - built
    for what, value in (
        ("its elements at the long sequence's price", elements),
        ("the block maps and their gradient", built),
        ("blocks of 16 steps in place of 32, calls", rest),
    ):
        print(f"    {what:<44}{1e9 * value / short / channels:>6.1f} ns")


def plot(budget: dict[torch.dtype, dict[str, float]], file: Path) -> None:
    """A bar of stacked parts for each type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.5))
    names = [str(dtype).removeprefix("torch.") for dtype in budget]
    left = [0.0] * len(names)
    colors = pyplot.get_cmap("tab20").colors
    names_of_parts = [name for name in budget[torch.float32] if name != "measured"]
    for color, part in zip(colors, names_of_parts, strict=False):
        widths = [1e3 * seconds[part] for seconds in budget.values()]
        axes.barh(names, widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="ms of a step of the 12M model")
    axes.legend(fontsize=7, ncols=2, loc="center right")
    figure.savefig(file, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
