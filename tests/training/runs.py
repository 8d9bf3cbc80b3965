"""Trains tiny models in processes of their own and reads their losses."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalodon_mcore.__main__ import main
from training.program_server import READ_BY_IMPORTS, ProgramServer

MODEL = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "2"),
    *("--ffn-hidden-size", "96", "--seq-length", "48", "--max-position-embeddings", "48"),
    *("--untie-embeddings-and-output-weights", "--megalodon-chunk-size", "16"),
)
DATA = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127")
SCHEDULE = (
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "6"),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--log-interval", "1"),
    *("--eval-iters", "0", "--eval-interval", "100"),
    # Six processes that read data would cost a run of these more than it does otherwise.
    *("--num-workers", "0"),
)
DROPOUT = (
    *("--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
    *("--megalodon-hidden-dropout", "0.1"),
)
TINY = (*MODEL, *DATA, *SCHEDULE)

PRETRAIN = ("-m", "megalodon_mcore", "pretrain")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Run:
    """What TensorBoard was told of each iteration, by the iteration's number, and what was said."""

    losses: dict[int, float]
    gradient_norms: dict[int, float]
    output: str


def train(
    folder: Path,
    *arguments: str,
    processes: int = 1,
    program: tuple[str, ...] = PRETRAIN,
    **environment: str,
) -> Run:
    """Trains to the end, keeping TensorBoard's file in `folder`; fails where training does."""
    result = launch(
        *program,
        *arguments,
        *("--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"),
        processes=processes,
        **environment,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    return Run(scalars(folder, "lm loss"), scalars(folder, "grad-norm"), result.stdout)


def launch(*program: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python PROGRAM`, under torchrun where several processes are wanted.

    Of `pretrain`, whose imports take longer than these runs, it takes forks.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    if program[:3] == PRETRAIN and not any(z.startswith(READ_BY_IMPORTS) for z in environment):
        inherited |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
        code, output = ProgramServer.run(list(program[2:]), processes, inherited, timeout=300)
        return subprocess.CompletedProcess(program, code, output)
    return subprocess.run(
        [sys.executable, *((*TORCHRUN, str(processes)) if processes > 1 else ()), *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
    )


def generate(checkpoint: Path, *options: object) -> subprocess.CompletedProcess:
    """Runs `megalodon-mcore generate` here: it takes nothing of a process that others need."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(["generate", "--checkpoint", str(checkpoint), *map(str, options)])
    return subprocess.CompletedProcess((), code, said.getvalue())


def scalars(folder: Path, name: str) -> dict[int, float]:
    """A TensorBoard scalar by iteration. (Megatron's second printed loss is a mean of two.)"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def side_by_side(*jobs: Callable[[], Any]) -> list[Any]:
    """Does the jobs two at a time and returns their results in order."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def save_to(folder: Path) -> tuple[str, ...]:
    """Arguments that save a checkpoint when training ends."""
    return ("--save", str(folder), "--save-interval", "1000")
