"""The quickstart's work: prepare text, train, plot, evaluate, sample, summarize.

Each stage reuses what an earlier run left, and training resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from tqdm import tqdm

if TYPE_CHECKING:
    from megalodon_mcore.conversion.text import TextTokenizer
    from megalodon_mcore.hf import MegalodonForCausalLM

SEQUENCE_LENGTH = 512
BATCH_SIZE = 8
BLOCKS = ["--num-layers", "4", "--num-attention-heads", "1"]
MODEL_ARGUMENTS = [
    *(
        "--hidden-size",
        "256",
        "--ffn-hidden-size",
        "384",
        "--swiglu",
        "--untie-embeddings-and-output-weights",
    ),
    *("--megalodon-chunk-size", "128", "--make-vocab-size-divisible-by", "8"),
]
BESIDE = {
    "*": [
        "--position-embedding-type",
        "rope",
        "--group-query-attention",
        "--num-query-groups",
        "2",
    ],
    "E": ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "192"],
}
"""Arguments of layers beside the blocks, by their symbols in a pattern."""
OPTIMIZER_ARGUMENTS = [
    *(
        "--lr",
        "3e-3",
        "--min-lr",
        "1e-4",
        "--lr-decay-style",
        "cosine",
        "--lr-warmup-fraction",
        "0.08",
    ),
    *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--clip-grad", "1.0"),
]
LOG_LINE = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\dE.+-]+)"
)


def main() -> None:
    """Runs every stage and prints where its results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text",
        default="python-stdlib",
        help="File or folder of text to train on; by default the Python standard library's source.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="Results.")
    parser.add_argument("--iterations", type=int, default=240, help="Optimizer steps (240).")
    parser.add_argument(
        "--pattern",
        help="Layers, such as MM*M: M a Megalodon block, * attention, - an MLP, E experts (MMMM).",
    )
    args = parser.parse_args()
    layers = layer_arguments(args.pattern)
    args.out.mkdir(parents=True, exist_ok=True)
    check_same_run(args)

    prefix = args.out / "data" / "text"
    prepare(args.text, prefix)
    checkpoint = args.out / "checkpoint"
    train(prefix, checkpoint, args.out, args.iterations, layers)

    from megalodon_mcore.conversion.hf_model import hf_model
    from megalodon_mcore.conversion.mcore_checkpoint import open_mcore
    from megalodon_mcore.conversion.text import TextTokenizer
    from megalodon_mcore.data.metadata import PreparedData
    from ngram import ngram_losses_of_prepared_data

    baselines = ngram_losses_of_prepared_data(prefix)
    valid = PreparedData.load(prefix).datasets["valid"].prefix
    with contextlib.redirect_stdout(io.StringIO()):
        opened = open_mcore(checkpoint)
        model = hf_model(opened)
    valid_loss = evaluate(model, valid)
    plot = draw(args.out, baselines.unigram, baselines.bigram)
    sample = generate(model, TextTokenizer(opened.tokenizer), args.out, valid)
    tokens = args.iterations * BATCH_SIZE * SEQUENCE_LENGTH
    summary = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": tokens,
        "tokens_per_second": round(tokens_per_second(args.out / "train.log"), 1),
        "valid_loss": valid_loss,
        "unigram_loss": baselines.unigram,
        "bigram_loss": baselines.bigram,
        "checkpoint": str(checkpoint),
        "plot": str(plot),
        "sample": str(sample),
    }
    write_atomically(args.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def layer_arguments(pattern: str | None) -> list[str]:
    """Training's arguments for what the layers are; stops where no model has such a pattern."""
    if pattern is None:
        return BLOCKS
    from megalodon_mcore.hybrid import check_pattern

    try:
        check_pattern(pattern, 4 if "E" in pattern else None)
    except ValueError as error:
        sys.exit(str(error).replace("--hybrid-layer-pattern", "--pattern"))
    if "|" in pattern:
        sys.exit(
            f"--pattern is {pattern}, but the quickstart trains in one process, without pipeline "
            f"stages (|); take {pattern.replace('|', '')}."
        )
    own = ["--hybrid-layer-pattern", pattern, "--num-attention-heads", "4"]
    beside = [argument for symbol in BESIDE if symbol in pattern for argument in BESIDE[symbol]]
    return [*own, "--megalodon-num-heads", "1", *beside]


def check_same_run(args: argparse.Namespace) -> None:
    """Refuses to mix two texts or schedules in one folder."""
    settings = {"text": args.text, "iterations": args.iterations}
    if args.pattern is not None:
        settings["pattern"] = args.pattern
    path = args.out / "settings.json"
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        sys.exit(f"{args.out} holds a run with {found}; give --out another folder or delete it.")
    write_atomically(path, json.dumps(settings))


def prepare(text: str, prefix: Path) -> None:
    """Writes the train, valid and test datasets, unless they are there."""
    if Path(f"{prefix}_meta.json").exists():
        print(f"Reusing the data at {prefix}.", flush=True)
        return
    print(f"Preparing {text}...", flush=True)
    run_command(
        "prepare-data",
        *(text, "--output-prefix", str(prefix), "--split", "0.97,0.02,0.01", "--overwrite"),
    )


def train(prefix: Path, checkpoint: Path, out: Path, iterations: int, layers: list[str]) -> None:
    """Trains in Megatron's loop with a progress bar; Megatron's own log goes to train.log."""
    from megalodon_mcore.data.metadata import PreparedData

    done = last_iteration(checkpoint)
    if done == iterations:
        print(f"Reusing the trained checkpoint at {checkpoint}.", flush=True)
        return
    command = [
        *("--micro-batch-size", str(BATCH_SIZE), "--global-batch-size", str(BATCH_SIZE)),
        *("--seq-length", str(SEQUENCE_LENGTH), "--max-position-embeddings", str(SEQUENCE_LENGTH)),
        *("--train-iters", str(iterations), "--log-interval", "5", "--num-workers", "0"),
        *("--eval-interval", "80", "--eval-iters", "4"),
        *("--save", str(checkpoint), "--load", str(checkpoint), "--save-interval", "40"),
        *("--tensorboard-dir", str(out / "tensorboard"), "--tensorboard-log-interval", "1"),
        "--log-validation-ppl-to-tensorboard",
        *MODEL_ARGUMENTS,
        *layers,
        *OPTIMIZER_ARGUMENTS,
        *PreparedData.load(prefix).megatron_arguments(),
    ]
    print(f"Training; the whole log is {out / 'train.log'}.", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megalodon_mcore", "pretrain", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with (
        open(out / "train.log", "a", encoding="utf-8") as log,
        tqdm(total=iterations, initial=done, unit="step", desc="training", mininterval=1) as bar,
    ):
        for line in process.stdout:
            log.write(line)
            log.flush()
            if match := LOG_LINE.search(line):
                bar.update(int(match[1]) - bar.n)
                bar.set_postfix(loss=f"{float(match[3]):.3f}")
            elif "validation loss at iteration" in line:
                bar.write(line.strip())
    if process.wait():
        sys.exit(f"Training stopped with status {process.returncode}; see {out / 'train.log'}.")


def last_iteration(checkpoint: Path) -> int:
    """The iteration of the last finished checkpoint, 0 where there is none."""
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def evaluate(model: torch.nn.Module, valid_prefix: str) -> float:
    """Nats per byte over every validation byte but the first.

    The validation text is cut into windows as long as training's sequences.
    """
    print("Evaluating on every validation byte...", flush=True)
    tokens = read_tokens(valid_prefix)
    total = 0.0
    windows = (tokens.numel() - 1) // SEQUENCE_LENGTH
    whole = windows * SEQUENCE_LENGTH
    inputs = list(tokens[:whole].view(-1, SEQUENCE_LENGTH).split(4 * BATCH_SIZE))
    labels = list(tokens[1 : whole + 1].view(-1, SEQUENCE_LENGTH).split(4 * BATCH_SIZE))
    if whole < tokens.numel() - 1:
        inputs.append(tokens[None, whole:-1])
        labels.append(tokens[None, whole + 1 :])
    with torch.no_grad():
        for batch, target in tqdm(list(zip(inputs, labels, strict=True)), desc="evaluating"):
            logits = model(batch, use_cache=False).logits.float()
            total += F.cross_entropy(logits.mT, target, reduction="sum").item()
    return total / (tokens.numel() - 1)


def draw(out: Path, unigram: float, bigram: float) -> Path:
    """Plots the training and validation losses beside the n-gram baselines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for tag, label, style in (
        ("lm loss", "training", "-"),
        ("lm loss validation", "validation", "o-"),
    ):
        points = sorted({event.step: event.value for event in events.Scalars(tag)}.items())
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram")
    axes.axhline(bigram, color="black", linestyle="--", label="bigram")
    axes.set(xlabel="step", ylabel="nats per byte", title="Megalodon quickstart", ylim=(1, 6))
    axes.legend()
    path = out / "loss.png"
    figure.savefig(path.with_suffix(".tmp.png"), dpi=120)
    os.replace(path.with_suffix(".tmp.png"), path)
    return path


def generate(
    model: MegalodonForCausalLM, tokenizer: TextTokenizer, out: Path, valid_prefix: str
) -> Path:
    """Continues the beginning of the validation text, printing as it goes."""
    from megalodon_mcore.generate import Sampling, StreamedText, generate_tokens

    prompt_ids = read_tokens(valid_prefix)[:64].tolist()
    text = tokenizer.detokenize(prompt_ids)
    print(f"A sample that continues the validation text:\n\n{text}", end="", flush=True)
    streamed = StreamedText(tokenizer, prompt_ids)

    def show(token: int) -> None:
        nonlocal text
        piece = streamed.add(token)
        print(piece, end="", flush=True)
        text += piece

    generate_tokens(model, prompt_ids, 400, show, Sampling(temperature=0.7))
    print(streamed.held)
    path = out / "sample.txt"
    write_atomically(path, text + streamed.held)
    return path


def read_tokens(prefix: str) -> torch.Tensor:
    """All tokens of an indexed dataset, int64."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # The dataset has to outlive its arrays, which are views of a file that it unmaps.
    dataset = IndexedDataset(prefix)
    return torch.cat([torch.from_numpy(dataset[i].astype("int64")) for i in range(len(dataset))])


def tokens_per_second(log: Path) -> float:
    """The median speed of the steps in a training log."""
    times = sorted(float(match[2]) for match in LOG_LINE.finditer(log.read_text()))
    return 1000.0 * BATCH_SIZE * SEQUENCE_LENGTH / times[len(times) // 2]


def run_command(*arguments: str) -> None:
    """Runs a command of megalodon-mcore; stops with its status where it fails."""
    status = subprocess.call([sys.executable, "-m", "megalodon_mcore", *arguments])
    if status:
        sys.exit(status)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    start = time.monotonic()
    warnings.filterwarnings("ignore", module="torch|megatron|megalodon_mcore.cpu")
    main()
    print(f"Done in {time.monotonic() - start:.0f} s.")
