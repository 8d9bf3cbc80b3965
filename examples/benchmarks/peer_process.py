"""Times a peer in a process of its own, as its users run it: with the defaults of torch and libc.

    python examples/benchmarks/peer_process.py megalodon-hf --length 2048 --checkout FOLDER

prints the median seconds of a forward and backward pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import models
import peers
from measure import backward_of, cema_inputs, median_seconds

BATCH = 2


def peer_seconds(
    name: str, length: int, seconds: float, checkout: Path | None = None
) -> float | None:
    """What this script prints for a peer of RUNS with this process's threads.

    Args:
        name: One of RUNS.
        length: Tokens of each of the BATCH sequences.
        seconds: Spent on warming up, and again on the measurement; three calls at least.
        checkout: Of github.com/pszemraj/megalodon-hf.

    Returns:
        None where the peer is not there.
    """
    if name == "megalodon-hf" and checkout is None:
        return None
    if name == "megalodon-jax" and not peers.has_megalodon_jax():
        return None
    command = [sys.executable, __file__, name, f"--length={length}", f"--seconds={seconds}"]
    command += [
        f"--threads={torch.get_num_threads()}",
        *([f"--checkout={checkout}"] * bool(checkout)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def _fft(length: int, checkout: Path) -> Callable[[], None]:
    x, parameters = cema_inputs(BATCH, length)
    return backward_of(lambda: peers.cema_by_fft(x, *parameters), x)


def _megalodon_hf(length: int, checkout: Path) -> Callable[[], None]:
    model = peers.megalodon_hf_model(peers.megalodon_hf(checkout), models.SIZES)
    tokens = torch.randint(models.SIZES["vocabulary"], (BATCH, length))

    def run() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    return run


def _megalodon_jax(length: int, checkout: Path) -> Callable[[], None]:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    return peers.megalodon_jax_step(models.SIZES, BATCH, length)


RUNS = {
    "cema-by-fft": _fft,
    "megalodon-hf": _megalodon_hf,
    "megalodon-jax": _megalodon_jax,
}


def main() -> None:
    """Runs one peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(RUNS))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkout", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(median_seconds(RUNS[args.name](args.length, args.checkout), args.seconds, 9))


if __name__ == "__main__":
    main()
