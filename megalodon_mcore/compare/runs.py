"""The commands that train and measure, run so that every finished one is kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_mcore.allocator import with_large_pages
from megalodon_mcore.compare.equal_size import Shape
from megalodon_mcore.compare.presets import GPTS, HE, MEGALODON, WINDOW, Settings

PRETRAIN, MEASURE = "pretrain", "compare-measure"
LOSS, VALIDATION, TIME = "lm loss", "lm loss validation", "iteration-time"
GPT_SPEC = ("megatron.training.models.gpt", "default_layer_spec")
"""What Megatron's model builder takes without --spec: the layers of --transformer-impl."""
VOCABULARY_MULTIPLE = 8
LOG_LINE = re.compile(r"iteration +(\d+)/.*lm loss: ([\dE.+-]+)")


def model_arguments(settings: Settings, peer: str, shape: Shape) -> list[str]:
    """Megatron's arguments of a model, its precision included."""
    arguments = {
        "num-layers": shape.layers,
        "hidden-size": shape.hidden_size,
        "ffn-hidden-size": shape.ffn_hidden_size,
        "num-attention-heads": shape.heads or settings.heads,
        "make-vocab-size-divisible-by": VOCABULARY_MULTIPLE,
        "transformer-impl": settings.implementation,
    }
    flags = ["--swiglu", "--untie-embeddings-and-output-weights"]
    flags += ["--bf16"] if settings.precision == "bf16" else []
    if shape.heads:
        arguments["position-embedding-type"] = "rope"
    if peer in GPTS:
        flags += ["--spec", *GPT_SPEC]
        if peer == WINDOW:
            arguments["window-size"] = f"{settings.window - 1},0"
        if peer == HE:
            # As layers/initialization.py has them; Megatron's is 0.02 at any width.
            arguments["init-method-std"] = f"{(3 * shape.hidden_size) ** -0.5:.6f}"
            arguments["embedding-init-method-std"] = f"{shape.hidden_size**-0.5:.6f}"
    else:
        arguments["megalodon-chunk-size"] = settings.chunk_size
        arguments["megalodon-num-heads"] = settings.heads
        if peer != MEGALODON:
            arguments["hybrid-layer-pattern"] = peer
            del arguments["num-layers"]
    return [*_options(arguments), *flags]


def training_arguments(
    settings: Settings, learning_rate: float, seed: int, iterations: int
) -> list[str]:
    """Megatron's arguments that every model has alike: data's order, schedule and logging."""
    arguments = {
        "seq-length": settings.seq_length,
        "max-position-embeddings": settings.longest,
        "micro-batch-size": settings.micro_batch_size,
        "global-batch-size": settings.batch_size,
        "train-iters": iterations,
        "seed": seed,
        "lr": f"{learning_rate:g}",
        "min-lr": f"{learning_rate / 10:g}",
        "lr-decay-style": "cosine",
        "lr-warmup-fraction": 0.1,
        "weight-decay": 0.1,
        "adam-beta2": 0.95,
        "clip-grad": 1.0,
        # Once, when training ends.
        "eval-interval": 10 * iterations,
        "eval-iters": max(1, 64 // settings.batch_size),
        "log-interval": max(1, iterations // 100),
        "tensorboard-log-interval": 1,
        "num-workers": 0,
    }
    # A run that diverges is a result, and goes on to its end.
    flags = ["--log-timers-to-tensorboard", "--no-check-for-nan-in-loss-and-grad"]
    return [*_options(arguments), *flags]


def _options(arguments: dict[str, object]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def train(
    folder: Path, name: str, arguments: Sequence[str], iterations: int, save_interval: int
) -> None:
    """Trains in Megatron's loop, unless it was done; goes on from the last checkpoint."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = str(folder / "checkpoint")
    saved = {"save": checkpoint, "load": checkpoint, "save-interval": save_interval}
    # A multiple of the other, as Megatron wants, that comes never: the last one alone is kept.
    saved["save-retain-interval"] = save_interval * (iterations + 1)
    command = [*arguments, *_options(saved), "--tensorboard-dir", str(folder / "tensorboard")]
    (folder / "command.txt").write_text(f"megalodon-mcore {PRETRAIN} {shlex.join(command)}\n")
    run(PRETRAIN, command, folder / "train.log", name, iterations)
    if last_iteration(folder) != iterations:
        raise ValueError(
            f"{name} ended at iteration {last_iteration(folder)} of {iterations}; see "
            f"{folder / 'train.log'}, and run the same command again to go on."
        )
    (folder / "done").touch()


def measure(job: dict, arguments: Sequence[str], result: Path, name: str) -> dict:
    """What `measure.py` finds of a model by a job, kept in a file beside the job."""
    found = read_json(result)
    if found is None:
        result.parent.mkdir(parents=True, exist_ok=True)
        path = result.with_suffix(".job")
        path.write_text(json.dumps(job | {"result": str(result)}))
        run(MEASURE, [str(path), *arguments], result.with_suffix(".log"), name, None)
        found = json.loads(result.read_text())
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """An object in a file; None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


processes = 1
"""Ranks that train a model, data-parallel; what measures is one process."""


def run(command: str, arguments: Sequence[str], log: Path, name: str, steps: int | None) -> None:
    """Runs a command of megalodon-mcore with a progress bar; its output goes to `log`.

    Raises:
        ValueError: it fails; names the log.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = launcher if command == PRETRAIN and processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *launcher, "-m", "megalodon_mcore", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=with_large_pages(os.environ),
        # The folder's lock goes along: a child left alone by a killed parent keeps it.
        close_fds=False,
    )
    assert process.stdout is not None
    # Ended by a signal, this process ends the other one too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with log.open("a", encoding="utf-8") as file, tqdm(total=steps, desc=name) as bar:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if match := LOG_LINE.search(line):
                    bar.update(int(match[1]) - bar.n)
                    bar.set_postfix_str(f"loss {float(match[2]):.3f}")
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
    if status:
        raise ValueError(f"{command} of {name} stopped with status {status}; see {log}.")


def drop_checkpoint(folder: Path) -> None:
    """Frees the space of what a finished run has no more use for."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def last_iteration(folder: Path) -> int:
    """The iteration of a run's last finished checkpoint, 0 where there is none."""
    tracker = folder / "checkpoint" / "latest_checkpointed_iteration.txt"
    number = tracker.read_text().strip() if tracker.exists() else ""
    return int(number) if number.isdecimal() else 0


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard was told of a run, by tag and step; of a step done twice, the last.

    Nothing where its files are not there.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (folder / "tensorboard").is_dir():
        return {tag: {} for tag in (LOSS, VALIDATION, TIME)}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in (LOSS, VALIDATION, TIME):
        each = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        found[tag] = {event.step: event.value for event in sorted(each, key=lambda e: e.wall_time)}
    return found
