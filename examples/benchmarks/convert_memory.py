"""Peak memory of `megalodon-mcore convert`, format by format, beside the checkpoint's size.

    python examples/benchmarks/convert_memory.py --preset 1.3b --work FOLDER

Makes a checkpoint of random weights and converts it mcore -> hf -> released -> mcore, each time in
a process of its own. Needs room for two checkpoints in FOLDER.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.conversion.mcore_checkpoint import write_mcore
from megalodon_mcore.conversion.model import OpenModel
from megalodon_mcore.parameters import Parameter, parameters
from megalodon_mcore.sizes import SIZES

VOCABULARY = 32_000
STEPS = (("mcore", "hf"), ("hf", "released"), ("released", "mcore"))
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
EVERY = 0.02
"""Seconds between looks at a process."""

TINY = MegalodonConfig(
    num_layers=1,
    hidden_size=32,
    num_heads=1,
    ffn_hidden_size=32,
    cema_ndim=4,
    chunk_size=16,
    vocab_size=64,
)
"""What Python takes, beside next to nothing of a model."""


def main() -> None:
    """Prints a row per conversion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(SIZES), default="1.3b")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(f"{'':<30}{'checkpoint':>12}{'anonymous':>12}{'mapped files':>14}{'time':>10}")
    for name, shape in (("tiny", TINY), (args.preset, SIZES[args.preset])):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            start = random_checkpoint(Path(folder) / "mcore", shape, DTYPES[args.dtype])
            total = sum(file.stat().st_size for file in start.rglob("*") if file.is_file())
            for step, anonymous, files, seconds in conversions(start, Path(folder)):
                mib = (f"{value / 2**20:>8,.0f} MiB" for value in (total, anonymous, files))
                row = "{:<30}{}{}  {}{:>8.1f} s".format(f"{name}: {step}", *mib, seconds)
                print(row, flush=True)
    largest = max(torch.Size(p.shape).numel() for p in parameters(shape))
    print(f"Largest tensor: {largest * DTYPES[args.dtype].itemsize / 2**20:,.0f} MiB")


def conversions(start: Path, folder: Path) -> Iterator[tuple[str, int, int, float]]:
    """Converts along STEPS, removing what is no longer needed; yields a step's name and figures."""
    given = start
    for number, (source, target) in enumerate(STEPS):
        made = folder / f"{number}-{target}"
        command = ["-m", "megalodon_mcore", "convert", "--from", source, "--to", target]
        began = time.perf_counter()
        anonymous, files = peaks([sys.executable, *command, str(given), str(made)])
        yield f"{source} -> {target}", anonymous, files, time.perf_counter() - began
        shutil.rmtree(given)
        given = made


def peaks(command: list[str]) -> tuple[int, int]:
    """A process's largest anonymous memory and largest resident part of mapped files, in bytes.

    The kernel drops pages of mapped files whenever it wants their room for something else.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    process = subprocess.Popen(command)
    anonymous = files = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in found:
            anonymous = max(anonymous, 1024 * int(found["RssAnon"].split()[0]))
            files = max(files, 1024 * int(found["RssFile"].split()[0]))
        time.sleep(EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return anonymous, files


def random_checkpoint(folder: Path, shape: MegalodonConfig, dtype: torch.dtype) -> Path:
    """Writes a Megatron checkpoint of random weights; returns the folder."""

    def draw(parameter: Parameter) -> torch.Tensor:
        kind = torch.float32 if parameter.float32 else dtype
        return torch.empty(parameter.shape, dtype=kind).uniform_(-1, 1)

    folder.mkdir()
    write_mcore(OpenModel(folder, shape, dtype, draw), folder, dtype, folder, 128, iter)
    return folder


if __name__ == "__main__":
    main()
