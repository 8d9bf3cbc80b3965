"""Megalodon on the CPU beside its peers: one table of ratios and targets from one run.

    python examples/benchmarks/cpu.py --megalodon-hf PATH_OF_A_CHECKOUT

megalodon-hf, megalodon-jax and the FFT run in processes of their own, with the defaults that their
users have; Megatron's GPT and torch's layer_norm run here. Rows whose peer is missing are left out.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from megalodon_mcore.kernels.cema import cema
from megalodon_mcore.kernels.timestep_norm import timestep_norm

import models
from measure import (
    backward_of,
    cema_inputs,
    gemm_peak,
    machine,
    median_seconds,
    peak_extra_bytes,
    read_bandwidth,
)
from megalodon_mcore.allocator import keep_freed_memory
from peer_process import peer_seconds

LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclass
class Row:
    """A measured ratio; better is larger, unless the target starts with <. It may have none."""

    group: str
    what: str
    ours: str
    peer: str
    ratio: float
    target: str

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        if not self.target:
            return True
        bound = float(self.target.lstrip("<>= "))
        return self.ratio <= bound if self.target.startswith("<") else self.ratio >= bound


def main() -> None:
    """Runs the chosen groups of rows, prints the table and writes JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megalodon-hf", type=Path, help="Checkout of pszemraj/megalodon-hf.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="Spent on each measurement (3).")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # As the CPU stand-in does for a training run.
    keep_freed_memory()
    print(machine(), f"\ncommand: {' '.join(sys.argv)}\n", flush=True)
    rows: list[Row] = []
    curves: dict[str, dict[int, float]] = {}
    for group in args.only:
        for row in GROUPS[group](args, curves):
            rows.append(row)
            print(line(row), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "command": sys.argv,
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "curves": curves,
    }
    (args.output / "results.json").write_text(json.dumps(result, indent=2))
    plot(curves, args.output)
    print(f"\nwritten: {args.output}/results.json and plots")


def line(row: Row) -> str:
    """A row of the table."""
    mark = "" if not row.target else "met" if row.met else "MISSED"
    return f"{row.what:<58} {row.ours:>14} {row.peer:>14} {row.ratio:>8.2f} {row.target:>8} {mark}"


def cema_rows(args: argparse.Namespace, curves: dict) -> Iterator[Row]:
    """CEMA forward and backward against a plain FFT and megalodon-hf; memory and flatness."""
    x, parameters = cema_inputs(2, 4096)
    ours = median_seconds(backward_of(lambda: cema(x, *parameters)[0], x), args.seconds)
    what = "CEMA B 2, L 4096, D 1024, N 16"
    for peer, run, target in (
        ("plain FFT", "cema-by-fft", ">= 10"),
        ("megalodon-hf", "megalodon-hf-cema", ">= 20"),
    ):
        time = peer_seconds(run, 4096, args.seconds, args.megalodon_hf)
        if time is not None:
            label = f"{what}: {peer}"
            yield Row("cema", label, seconds(ours), seconds(time), time / ours, target)
    extra = peak_extra_bytes(backward_of(lambda: cema(x, *parameters)[0], x))
    size = 4 * x.numel()
    yield Row("cema", f"{what}: peak memory / input", mib(extra), mib(size), extra / size, "< 4")
    curve, memory = {}, {}
    for length in LENGTHS:
        x, parameters = cema_inputs(1, length, 256)
        run = backward_of(lambda: cema(x, *parameters)[0], x)  # noqa: B023 - called before it changes
        curve[length] = median_seconds(run, args.seconds) / x.numel() * 1e9
        memory[length] = peak_extra_bytes(run) / 2**20
    curves["CEMA, ns per element"] = curve
    curves["CEMA, MiB of peak memory"] = memory
    spread = max(curve.values()) / min(curve.values())
    low, high = f"{min(curve.values()):.1f} ns", f"{max(curve.values()):.1f} ns"
    yield Row("cema", "CEMA time per element, L 1024 to 262144", low, high, spread, "<= 1.15")


def norm_rows(args: argparse.Namespace, curves: dict) -> Iterator[Row]:
    """TimestepNorm against torch's layer_norm."""
    x = torch.randn(2, 4096, 1024, requires_grad=True)
    weight, bias = (torch.randn(1024, requires_grad=True) for _ in range(2))
    ours = median_seconds(
        backward_of(lambda: timestep_norm(x, weight, bias, 32, 1e-5)[0], x), args.seconds
    )
    peer = median_seconds(
        backward_of(lambda: F.layer_norm(x, (1024,), weight, bias), x), args.seconds
    )
    what = "TimestepNorm time / layer_norm's, B 2, L 4096, D 1024"
    yield Row("norm", what, seconds(ours), seconds(peer), ours / peer, "<= 2.5")


def model_rows(args: argparse.Namespace, curves: dict) -> Iterator[Row]:
    """The 12M model against the GEMM peak, megalodon-jax, megalodon-hf and its own bf16."""
    peak = gemm_peak(torch.float32)
    speeds, shares = {}, {}
    with models.megatron():
        for length, jax_target, hf_target in ((2048, ">= 1.6", ">= 3.3"), (8192, ">= 2.5", ">= 5")):
            tokens = 2 * length
            time = median_seconds(
                models.forward_backward(models.megalodon(), 2, length), args.seconds, 5
            )
            speeds[length] = tokens / time
            shares[length] = models.matrix_flops(2, length) / time / peak
            ours, ceiling = rate(speeds[length]), f"{peak / 1e9:.0f} GFLOP/s"
            what = f"12M model, L {length}"
            yield Row("model", f"{what}: of the GEMM peak", ours, ceiling, shares[length], ">= 0.7")
            for name, target in (("megalodon-jax", jax_target), ("megalodon-hf", hf_target)):
                time = peer_seconds(name, length, args.seconds, args.megalodon_hf)
                if time is not None:
                    peer = tokens / time
                    ratio = speeds[length] / peer
                    yield Row("model", f"{what}: {name}", ours, rate(peer), ratio, target)
            half = models.megalodon(torch.bfloat16).bfloat16()
            time = median_seconds(models.forward_backward(half, 2, length), args.seconds, 5)
            bf16 = tokens / time
            ratio = bf16 / speeds[length]
            yield Row("model", f"{what}: bf16 / float32", rate(bf16), ours, ratio, ">= 2.5")
    curves["12M model, tokens/s"] = speeds
    curves["12M model, share of GEMM peak"] = shares


def step_rows(args: argparse.Namespace, curves: dict) -> Iterator[Row]:
    """A whole Megatron step against Megatron's own GPT of about the same size."""
    chunk = models.SIZES["chunk"]
    costs = {}
    with models.megatron():
        for length, target in ((chunk, ">= 0.94"), (8 * chunk, ">= 1.32")):
            batch = 8 * chunk // length
            ours, peer = (
                batch
                * length
                / median_seconds(models.training_step(m, batch, length), args.seconds, 5)
                for m in (models.megalodon(), models.gpt(torch.float32, length))
            )
            costs[length] = 1e6 / ours
            what = f"Megatron step, L {length}: GPT's speed"
            yield Row("step", what, rate(ours), rate(peer), ours / peer, target)
    curves["Megatron step, us per token"] = costs


def decoding_rows(args: argparse.Namespace, curves: dict) -> Iterator[Row]:
    """Time per generated token of the Hugging Face model against reading the weights once."""
    bandwidth = read_bandwidth()
    with torch.inference_mode():
        for name, sizes in (("12M", models.SIZES), ("200m", models.SIZES_200M)):
            model = models.hugging_face(sizes)
            tokens = torch.randint(sizes["vocabulary"], (1, 700))
            cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
            token = torch.zeros(1, 1, dtype=torch.int64)
            step = partial(model, token, past_key_values=cache)
            time = median_seconds(step, args.seconds, 500)
            # Of the embedding a token reads one row.
            embedding = model.get_input_embeddings().weight.numel()
            weights = 4 * (sum(z.numel() for z in model.parameters()) - embedding)
            reading = weights / bandwidth
            what = f"{name} model: decoding a token / reading the weights"
            yield Row("decoding", what, seconds(time), seconds(reading), time / reading, "")


GROUPS: dict[str, Callable[[argparse.Namespace, dict], Iterator[Row]]] = {
    # Before training has scattered the process's memory: decoding has a process of its own.
    "decoding": decoding_rows,
    "norm": norm_rows,
    "cema": cema_rows,
    "model": model_rows,
    "step": step_rows,
}


def seconds(value: float) -> str:
    """A time for the table."""
    return f"{value:.3f} s" if value >= 0.1 else f"{1e3 * value:.2f} ms"


def rate(value: float) -> str:
    """Tokens per second for the table."""
    return f"{value:,.0f} tok/s"


def mib(value: float) -> str:
    """Bytes for the table."""
    return f"{value / 2**20:.0f} MiB"


def plot(curves: dict[str, dict[int, float]], folder: Path) -> None:
    """One picture per curve, over the sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, curve in curves.items():
        figure, axes = pyplot.subplots(figsize=(6, 4))
        axes.plot(list(curve), list(curve.values()), marker="o")
        axes.set(xlabel="sequence length", ylabel=name, xscale="log", ylim=(0, None))
        file = name.replace(",", "").replace("/", " per ").replace(" ", "-")
        figure.savefig(folder / f"{file}.png", bbox_inches="tight")
        pyplot.close(figure)


if __name__ == "__main__":
    main()
