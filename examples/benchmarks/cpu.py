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
    machine,
    median_seconds,
    peak_extra_bytes,
)
from megalodon_mcore.allocator import keep_freed_memory
from peer_process import peer_seconds


@dataclass
class Row:
    """A measured ratio; better is larger, unless the target starts with <."""

    what: str
    ours: str
    peer: str
    ratio: float
    target: str

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        bound = float(self.target.lstrip("<>= "))
        return self.ratio <= bound if self.target.startswith("<") else self.ratio >= bound


def main() -> None:
    """Runs the chosen groups of rows, prints the table and writes JSON."""
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
    for group in args.only:
        for row in GROUPS[group](args):
            rows.append(row)
            print(line(row), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "command": sys.argv,
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
    (args.output / "results.json").write_text(json.dumps(result, indent=2))
    print(f"\nwritten: {args.output}/results.json")


def line(row: Row) -> str:
    """A row of the table."""
    mark = "met" if row.met else "MISSED"
    return f"{row.what:<62} {row.ours:>14} {row.peer:>14} {row.ratio:>8.2f} {row.target:>8} {mark}"


def cema_rows(args: argparse.Namespace) -> Iterator[Row]:
    """CEMA forward and backward against a plain FFT, and the memory it takes."""
    x, parameters = cema_inputs(2, 4096)
    run = backward_of(lambda: cema(x, *parameters)[0], x)
    ours = median_seconds(run, args.seconds)
    peer = peer_seconds("cema-by-fft", 4096, args.seconds)
    what = "CEMA B 2, L 4096, D 1024, N 16"
    yield Row(f"{what}: plain FFT", seconds(ours), seconds(peer), peer / ours, ">= 10")
    extra, size = peak_extra_bytes(run), 4 * x.numel()
    yield Row(f"{what}: peak memory / input", mib(extra), mib(size), extra / size, "<= 4")


def norm_rows(args: argparse.Namespace) -> Iterator[Row]:
    """TimestepNorm against torch's layer_norm."""
    x = torch.randn(4096, 2, 1024, requires_grad=True)
    weight, bias = (torch.randn(1024, requires_grad=True) for _ in range(2))
    ours = median_seconds(
        backward_of(lambda: timestep_norm(x, weight, bias, 32, 1e-5)[0], x), args.seconds
    )
    peer = median_seconds(
        backward_of(lambda: F.layer_norm(x, (1024,), weight, bias), x), args.seconds
    )
    what = "TimestepNorm time / layer_norm's, B 2, L 4096, D 1024"
    yield Row(what, seconds(ours), seconds(peer), ours / peer, "<= 4")


def model_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The 12M model against megalodon-jax and megalodon-hf."""
    with models.megatron():
        for length in (2048, 8192):
            tokens = 2 * length
            run = models.forward_backward(models.megalodon(), 2, length)
            ours = tokens / median_seconds(run, args.seconds, 5)
            for name, target in (("megalodon-jax", ">= 1.5"), ("megalodon-hf", ">= 2.5")):
                time = peer_seconds(name, length, args.seconds, args.megalodon_hf)
                if time is not None:
                    peer = tokens / time
                    what = f"12M model, L {length}: {name}"
                    yield Row(what, rate(ours), rate(peer), ours / peer, target)


def step_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A whole Megatron step against Megatron's own GPT of about the same size."""
    chunk = models.SIZES["chunk"]
    with models.megatron():
        for length, target in ((chunk, ">= 0.90"), (8 * chunk, ">= 1.32")):
            batch = 8 * chunk // length
            ours, peer = (
                batch
                * length
                / median_seconds(models.training_step(m, batch, length), args.seconds, 5)
                for m in (models.megalodon(), models.gpt(torch.float32, length))
            )
            what = f"Megatron step, L {length}: GPT's speed"
            yield Row(what, rate(ours), rate(peer), ours / peer, target)


def packed_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row of 64 documents, of lengths that rise evenly, against one document of that length."""
    length = 16_384
    bounds = sorted({length * i * i // 64**2 for i in range(65)})
    with models.megatron():
        model = models.megalodon()
        packed, plain = (
            models.forward_backward(model, 1, length, bounds=given) for given in (bounds, None)
        )
        ours, peer = (median_seconds(run, args.seconds) for run in (packed, plain))
        what = f"12M model, {length:,} steps of 64 documents: of one"
        yield Row(f"{what}, time", seconds(ours), seconds(peer), ours / peer, "<= 1.05")
        ours, peer = (peak_extra_bytes(run) for run in (packed, plain))
        yield Row(f"{what}, memory", mib(ours), mib(peer), ours / peer, "<= 1.05")


GROUPS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "norm": norm_rows,
    "cema": cema_rows,
    "packed": packed_rows,
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


if __name__ == "__main__":
    main()
