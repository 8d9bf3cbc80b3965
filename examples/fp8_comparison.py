"""Trains one small model in float32, BF16 and emulated FP8, and measures each linear layer's share.

Every run starts from the same parameters and sees the same batches. FP8 runs are BF16 ones whose
linear layers emulate FP8; with --each-layer, there is one more run for each kind of linear layer,
which alone does. At the parameters that float32 training ended with, the effect of each kind in FP8
on the loss and its gradient is measured. Writes table.md and loss.png; keeps runs that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SEQUENCE_LENGTH = 128
BATCH_SIZE = 8
MODEL_ARGUMENTS = [
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "1"),
    *("--ffn-hidden-size", "256", "--swiglu", "--untie-embeddings-and-output-weights"),
    *("--megalodon-chunk-size", "64", "--make-vocab-size-divisible-by", "8"),
]
OPTIMIZER_ARGUMENTS = [
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-decay-style", "cosine"),
    *("--lr-warmup-fraction", "0.08", "--weight-decay", "0.1", "--adam-beta2", "0.95"),
    *("--clip-grad", "1.0"),
]
LAYERS = ("linear_z", "linear_v", "linear_r", "linear_proj", "linear_fc1", "linear_fc2")
RECIPES = ("tensorwise", "blockwise", "mxfp8")
BF16 = ["--bf16"]
WHOLE_MODEL = {
    "float32": [],
    "BF16": BF16,
    **{f"FP8 {recipe}": [*BF16, "--megalodon-emulated-fp8", recipe] for recipe in RECIPES},
}
ONE_LAYER = {
    f"{layer} alone in FP8 tensorwise": [
        *(*BF16, "--megalodon-emulated-fp8", "tensorwise"),
        *("--megalodon-emulated-fp8-layers", layer),
    ]
    for layer in LAYERS
}
GRADIENT_BATCHES = 8


def main() -> None:
    """Prepares the text, trains, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="File or folder of text, or python-stdlib.")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"), help="Results (runs/fp8).")
    parser.add_argument("--steps", type=int, default=150, help="Optimizer steps of a run (150).")
    parser.add_argument(
        "--each-layer", action="store_true", help="Train with each kind of layer alone in FP8, too."
    )
    args = parser.parse_args()
    out = args.out / f"{args.steps}-steps"
    out.mkdir(parents=True, exist_ok=True)

    prefix = args.out / "data" / "text"
    if not Path(f"{prefix}_meta.json").exists():
        command = ("prepare-data", args.text, "--output-prefix", str(prefix))
        run_command(*command, "--split", "0.9,0.1,0", log=args.out / "prepare.log")
    runs = {**WHOLE_MODEL, **(ONE_LAYER if args.each_layer else {})}
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, out, prefix, args.steps, *run) for run in runs.items()]
        for job in jobs:
            job.result()
    train_losses = {name: scalars(out / slug(name), "lm loss") for name in runs}
    valid_losses = {
        name: scalars(out / slug(name), "lm loss validation")[args.steps] for name in runs
    }
    errors = gradient_errors(out / slug("float32") / "checkpoint", prefix)
    table = (
        f"{args.steps} steps of {BATCH_SIZE} x {SEQUENCE_LENGTH} bytes\n\n"
        f"{loss_table(train_losses, valid_losses)}\n\n{error_table(errors)}\n"
    )
    (out / "table.md").write_text(table, encoding="utf-8")
    draw(out / "loss.png", {name: train_losses[name] for name in WHOLE_MODEL})
    print(f"{table}\nWritten to {out}: table.md, loss.png.")


def train(out: Path, prefix: Path, steps: int, name: str, arguments: list[str]) -> None:
    """One run, unless it is there."""
    from megalodon_mcore.data.metadata import PreparedData

    folder = out / slug(name)
    if (folder / "done").exists():
        return
    folder.mkdir(exist_ok=True)
    print(f"Training {name}...", flush=True)
    for old in folder.glob("events.*"):
        old.unlink()
    save = ("--save", str(folder / "checkpoint"), "--save-interval", str(steps))
    run_command(
        "pretrain",
        *("--micro-batch-size", str(BATCH_SIZE), "--global-batch-size", str(BATCH_SIZE)),
        *("--seq-length", str(SEQUENCE_LENGTH), "--max-position-embeddings", str(SEQUENCE_LENGTH)),
        *("--train-iters", str(steps), "--log-interval", str(max(1, steps // 10))),
        *("--eval-interval", str(steps), "--eval-iters", str(min(40, steps))),
        *("--num-workers", "0"),
        *("--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"),
        *(save if name == "float32" else ()),
        *(*MODEL_ARGUMENTS, *OPTIMIZER_ARGUMENTS),
        *PreparedData.load(prefix).megatron_arguments(),
        *arguments,
        log=folder / "train.log",
    )
    (folder / "done").touch()


def gradient_errors(checkpoint: Path, prefix: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """By what is in FP8 and by recipe: the relative error of the gradient, the loss's increase."""
    from megalodon_mcore.data.metadata import PreparedData
    from megatron_model import load_model

    with contextlib.redirect_stdout(io.StringIO()):
        arguments = ("--megalodon-emulated-fp8", RECIPES[0])
        model = load_model(checkpoint, arguments=arguments).model
    linears = {
        module: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "recipe")
    }
    tokens = read_tokens(PreparedData.load(prefix).datasets["valid"].prefix)
    length = GRADIENT_BATCHES * BATCH_SIZE * SEQUENCE_LENGTH
    shape = (GRADIENT_BATCHES, BATCH_SIZE, SEQUENCE_LENGTH)
    batches = list(
        zip(tokens[:length].view(shape), tokens[1 : length + 1].view(shape), strict=True)
    )

    def gradients(recipe: str | None, layers: tuple[str, ...]) -> tuple[list[torch.Tensor], float]:
        for module, name in linears.items():
            module.recipe = recipe if name in layers else None
        each, losses = [], 0.0
        for inputs, labels in batches:
            model.zero_grad()
            loss = model(inputs, None, None, labels=labels).mean()
            loss.backward()
            each.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            losses += loss.item() / len(batches)
        return each, losses

    exact, exact_loss = gradients(None, ())
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    for what, layers in {"all": LAYERS, **{layer: (layer,) for layer in LAYERS}}.items():
        errors[what] = {}
        for recipe in RECIPES:
            each, loss = gradients(recipe, layers)
            relative = [
                ((a - e).norm() / e.norm()).item() for a, e in zip(each, exact, strict=True)
            ]
            errors[what][recipe] = (sum(relative) / len(relative), loss - exact_loss)
    return errors


def loss_table(train: dict[str, dict[int, float]], valid: dict[str, float]) -> str:
    """Final losses in nats per byte, and how far the validation loss is above BF16's."""
    rows = ["| run | training, last tenth | validation | over BF16 |", "| --- | --- | --- | --- |"]
    for name, losses in train.items():
        last = sorted(losses)[-max(1, len(losses) // 10) :]
        mean = sum(losses[step] for step in last) / len(last)
        over = valid[name] - valid["BF16"]
        rows.append(f"| {name} | {mean:.4f} | {valid[name]:.4f} | {over:+.4f} |")
    return "\n".join(rows)


def error_table(errors: dict[str, dict[str, tuple[float, float]]]) -> str:
    """The gradient's relative error by recipe, and the loss's increase, worst layer first."""
    rows = [
        "| in FP8 | " + " | ".join(f"gradient error, {recipe}" for recipe in RECIPES) + " | "
        "loss, tensorwise |",
        "| --- " * (len(RECIPES) + 2) + "|",
    ]
    for what in sorted(errors, key=lambda name: -errors[name]["tensorwise"][0]):
        relative = " | ".join(f"{100 * errors[what][recipe][0]:.2f}%" for recipe in RECIPES)
        rows.append(f"| {what} | {relative} | {errors[what]['tensorwise'][1]:+.5f} |")
    return "\n".join(rows)


def draw(path: Path, losses: dict[str, dict[int, float]]) -> None:
    """Loss curves, and below them their distance from float32's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 8), sharex=True)
    for name, values in losses.items():
        steps = sorted(values)
        above.plot(steps, [values[step] for step in steps], label=name, linewidth=1)
        difference = [values[step] - losses["float32"][step] for step in steps]
        below.plot(steps, difference, label=name, linewidth=1)
    above.set(ylabel="nats per byte", title="Training loss")
    below.set(xlabel="step", ylabel="nats per byte", title="Over float32")
    above.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """A TensorBoard scalar by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def read_tokens(prefix: str) -> torch.Tensor:
    """All tokens of an indexed dataset, int64."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return torch.cat([torch.from_numpy(dataset[i].astype("int64")) for i in range(len(dataset))])


def run_command(*arguments: str, log: Path) -> None:
    """Runs a command of megalodon-mcore on one thread; stops where it fails."""
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.call(
            [sys.executable, "-W", "ignore", "-m", "megalodon_mcore", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if status:
        sys.exit(f"megalodon-mcore {arguments[0]} stopped with status {status}; see {log}.")


def slug(name: str) -> str:
    """A run's folder."""
    return name.replace(" ", "-").lower()


if __name__ == "__main__":
    start = time.monotonic()
    warnings.filterwarnings("ignore", module="torch|megatron|megalodon_mcore.cpu")
    main()
    print(f"Done in {time.monotonic() - start:.0f} s.")
