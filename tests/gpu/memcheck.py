"""Stage 3: a small case of every operator under compute-sanitizer's memcheck.

Where it is missing, as in a rehearsal, the cases run without it and the row says so.
"""

import os
import shutil
import subprocess
import sys

import torch
from megalodon_mcore.kernels.paged_attention import paged_attention

from compiling import EVERY
from correctness import REHEARSED
from operators import Shape
from stage import Stage


def small(device):
    """Forward and backward of every operator on ragged sizes."""
    # A rehearsal, with nothing to find, is for the calls alone.
    rehearse = device.type == "cpu"
    shape = (
        Shape(1, 5, 8, 1, 1, 16, 16, 4, 16) if rehearse else Shape(2, 77, 24, 3, 3, 32, 64, 24, 80)
    )
    for name, operator in EVERY.items():
        if rehearse and name not in REHEARSED:
            continue
        for dtype in (torch.bfloat16, torch.float32)[: 1 if rehearse else 2]:
            leaves = operator.inputs(shape, dtype, device)
            outputs = operator.run(shape, *leaves)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    for dtype in (torch.bfloat16, torch.float32):
        decode(shape, dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize()


def decode(shape, dtype, device):
    """Attention from pages, of requests that have filled other shares of theirs."""
    heads, slots = shape.heads, shape.chunk + 3
    q, keys, values = (
        torch.randn(*sizes, width, dtype=dtype, device=device)
        for sizes, width in (
            ((3, heads), shape.key_width),
            ((4, heads, slots), shape.key_width),
            ((4, heads, slots), shape.value_width),
        )
    )
    pages, filled = torch.tensor([[3, 0, 2], [1, slots, 2]], device=device)
    paged_attention(q, keys, values, pages, filled)


def main(stage):
    # Each tensor is an allocation of its own, so that one place beyond it is outside.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        sys.executable,
        "-m",
        "memcheck",
        "--stage",
        "memcheck",
        "--rows",
        "",
        "--seconds",
        "0",
    ]
    command += ["--part", "small"] + (["--rehearse"] if stage.rehearse else [])
    tool = None if stage.rehearse else shutil.which("compute-sanitizer")
    if tool:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "86", *command]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(1, stage.left)
        )
    except subprocess.TimeoutExpired:
        stage.add("small cases", "cut")
        return
    last = (done.stdout + done.stderr).strip().splitlines()[-6:]
    if done.returncode:
        stage.add("small cases", "fail", problem=f"exit status {done.returncode}: {last}"[-600:])
        return
    stage.add("small cases", "pass")
    if not tool:
        stage.add("compute-sanitizer", "missing", problem="the cases ran without it")


if __name__ == "__main__":
    stage = Stage.from_arguments()
    if stage.part == "small":
        from comparing import INTERPRETED

        if INTERPRETED:
            import interpreter

            interpreter.mend()
        small(torch.device(stage.device))
    else:
        main(stage)
