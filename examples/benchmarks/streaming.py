"""A long stream through a small model: resident memory and time per token along the way.

    python examples/benchmarks/streaming.py [--only WAY ...]

Each way runs in a process of its own and leaves a JSON; the table and the plot show all that the
output folder has, so the ways can be run one at a time. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measure import machine, process_bytes

SIZES = {
    "layers": 1,
    "hidden_size": 128,
    "z_dim": 32,
    "value_dim": 256,
    "ffn": 320,
    "chunk": 256,
    "groups": 4,
    "vocabulary": 256,
}
TOKENS, TOKENS_READ = 200_000, 2_000_000
PIECE = 2048
"""Tokens read at once, and of a window, over which times are taken: whole chunks."""
MEMORY_TARGET, TIME_TARGET = 0.02, 0.10


def main() -> None:
    """Runs the chosen ways, prints the table of all and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument(
        "--tokens", type=int, help=f"Length; {TOKENS:,}, or {TOKENS_READ:,} read in pieces."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/streaming"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.here:
        torch.set_num_threads(args.threads)
        (way,) = args.only
        record = Record(args.tokens or (TOKENS_READ if way.endswith("reads") else TOKENS))
        WAYS[way](record)
        result = {"machine": machine(), "model": SIZES, **record.windows}
        (args.output / f"{way}.json").write_text(json.dumps(result))
        return
    for way in args.only:
        command = [sys.executable, __file__, "--here", "--only", way]
        command += ["--threads", str(args.threads)]
        command += ["--tokens", str(args.tokens)] if args.tokens else []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        subprocess.run([*command, "--output", str(args.output)], check=True, env=environment)
    results = {
        way: json.loads((args.output / f"{way}.json").read_text())
        for way in WAYS
        if (args.output / f"{way}.json").is_file()
    }
    print(next(iter(results.values()))["machine"], "\n")
    print(f"{'':<48}{'tokens':>10}  resident memory and time per token over tenths of the stream")
    print(f"{'':<58}  but the first: range, spread, target, last over second tenth")
    for way, result in results.items():
        print(line(way, result))
    plot(results, args.output)
    print(f"\nwritten: {args.output}")


class Record:
    """Measures every window of PIECE tokens of a stream.

    Args:
        total: tokens after which the stream has to stop.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.windows: dict[str, list[float]] = {"position": [], "seconds": [], "bytes": []}
        self.times: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, taken: int) -> bool:
        """Notes that a step took so many tokens; returns whether to go on."""
        self.done += taken
        self.times.append((time.perf_counter() - self.start) / taken)
        if self.done % PIECE == 0:
            self.windows["position"].append(self.done)
            self.windows["seconds"].append(statistics.median(self.times))
            self.windows["bytes"].append(process_bytes("VmRSS"))
            self.times = []
        self.start = time.perf_counter()
        return self.done < self.total


def hf_model() -> torch.nn.Module:
    """The Hugging Face model of SIZES."""
    from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM

    torch.manual_seed(1)
    return MegalodonForCausalLM(
        MegalodonConfig(
            vocab_size=SIZES["vocabulary"],
            hidden_size=SIZES["hidden_size"],
            num_hidden_layers=SIZES["layers"],
            intermediate_size=SIZES["ffn"],
            z_dim=SIZES["z_dim"],
            value_dim=SIZES["value_dim"],
            norm_num_groups=SIZES["groups"],
            chunk_size=SIZES["chunk"],
            piece_length=PIECE,
        )
    ).eval()


def read(run: Callable, record: Record) -> None:
    """Reads random tokens by pieces; run(tokens, state) returns logits and the state after them."""
    state, go_on = None, True
    while go_on:
        _, state = run(torch.randint(SIZES["vocabulary"], (1, PIECE)), state)
        go_on = record(PIECE)


def write(run: Callable, record: Record) -> None:
    """Feeds each likeliest token back."""
    token, state, go_on = torch.zeros(1, 1, dtype=torch.int64), None, True
    while go_on:
        logits, state = run(token, state)
        token = logits[:, -1:].argmax(-1)
        go_on = record(1)


@torch.inference_mode()
def with_hf(drive: Callable, record: Record) -> None:
    """The Hugging Face model with its cache."""
    model = hf_model()

    def run(tokens: torch.Tensor, cache: object) -> tuple:
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits, output.past_key_values

    drive(run, record)


def generate(record: Record) -> None:
    """What `megalodon-mcore generate` does."""
    from megalodon_mcore.generate import Sampling, generate_tokens

    greedy = Sampling(temperature=0.0)
    generate_tokens(hf_model(), [0], record.total, lambda _: record(1), greedy)


WAYS: dict[str, Callable[[Record], None]] = {
    "hf-reads": partial(with_hf, read),
    "hf-writes": partial(with_hf, write),
    "generate": generate,
}
NAMES = {
    "hf-reads": f"Hugging Face model with cache, {PIECE} at a time",
    "hf-writes": "Hugging Face model with cache, token by token",
    "generate": "megalodon-mcore generate",
}


def by_tenths(result: dict, key: str) -> list[float]:
    """Medians of the windows of each tenth of the stream."""
    values = result[key]
    bounds = [len(values) * i // 10 for i in range(11)]
    return [statistics.median(values[start:stop]) for start, stop in pairwise(bounds)]


def line(way: str, result: dict) -> str:
    """A row of the table; the first tenth is the warm-up."""
    text = f"{NAMES[way]:<48}{result['position'][-1]:>10,}"
    for key, scale, unit, target in (
        ("bytes", 2**-20, "MiB", MEMORY_TARGET),
        ("seconds", 1e6, "us", TIME_TARGET),
    ):
        tenths = [value * scale for value in by_tenths(result, key)[1:]]
        spread = max(tenths) / min(tenths) - 1
        mark = "met" if spread <= target else "MISSED"
        drift = tenths[-1] / tenths[0] - 1
        text += f"{min(tenths):>10.1f}..{max(tenths):.1f} {unit}"
        text += f"{spread:>8.2%} <= {target:.0%} {mark:<7}{drift:>+8.2%}"
    return text


def plot(results: dict[str, dict], folder: Path) -> None:
    """Memory and time per token along the stream, over their medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    for axes, key, title, band in (
        (panels[0], "bytes", "resident memory", MEMORY_TARGET),
        (panels[1], "seconds", "time per token", TIME_TARGET),
    ):
        for way, result in results.items():
            curve = result[key]
            middle = statistics.median(by_tenths(result, key)[1:])
            share = [100 * position / result["position"][-1] for position in result["position"]]
            label = f"{NAMES[way]} ({result['position'][-1]:,})"
            (drawn,) = axes.plot(share, [y / middle for y in curve], lw=0.6, alpha=0.4)
            tenths = [y / middle for y in by_tenths(result, key)]
            middles = [10 * i + 5 for i in range(10)]
            axes.plot(middles, tenths, "o-", color=drawn.get_color(), ms=3, label=label)
        axes.axhspan(1 - band / 2, 1 + band / 2, color="black", alpha=0.08, lw=0)
        axes.set(xlabel="% of the stream (tokens in brackets)", ylabel=f"{title} over its median")
        axes.set_ylim(1 - 3 * band, 1 + 3 * band)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "streaming.png", dpi=120)


if __name__ == "__main__":
    main()
