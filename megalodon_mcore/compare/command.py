"""The command line of `megalodon-mcore compare`, from the text to report.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_mcore.compare import ablations, runs, texts
from megalodon_mcore.compare.equal_size import TOLERANCE, Shape, equal_shapes
from megalodon_mcore.compare.presets import (
    FIELDS,
    GPTS,
    PRESETS,
    Settings,
    settings_from,
)
from megalodon_mcore.compare.presets import (
    add_arguments as add_settings,
)
from megalodon_mcore.data.metadata import PreparedData
from megalodon_mcore.folder_lock import lock_folder
from megalodon_mcore.gpu_arguments import count_gpus
from megalodon_mcore.whole_file import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compare`; every value of a preset has one."""
    parser.add_argument(
        "--preset",
        default="short",
        choices=[*PRESETS, "paper"],
        metavar="NAME",
        help="values that the options below change: "
        + "; ".join(f"{name} ({about})" for name, about in PRESETS.items())
        + "; paper (prints the commands of the paper's 7B run) (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="results (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=["python-stdlib"],
        help="files or folders of text, each file a document (the standard library's source)",
    )
    parser.add_argument(
        "--tokenizer", default="byte", help="byte, a Hugging Face folder or a SentencePiece model"
    )
    parser.add_argument(
        "--patterns",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="also models of other layers, such as MM*M: M a Megalodon block, * attention, - MLP",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="data-parallel processes that train a model (1)"
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also models that are another in one thing, at their model's best learning rate: "
        + ablations.KINDS,
    )
    parser.add_argument(
        "--ablation-seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="some of --seeds, in which they are trained (the first)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Does what is not yet done, and writes the report; returns the exit status.

    Raises:
        ValueError: one sentence names the argument, its value and what would work.
    """
    if args.preset == "paper":
        from megalodon_mcore.compare.paper import commands

        others = (*FIELDS, "patterns", "ablations", "ablation_seeds")
        for name in (name for name in others if getattr(args, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} is {_words(getattr(args, name))}, but --preset paper "
                "prints the paper's own run; leave one of them out."
            )
        print(commands())
        return 0
    settings = settings_from(args, args.patterns)
    seeds = args.ablation_seeds or list(settings.seeds[:1])
    ablations.check(args.ablations, seeds, settings)
    _check_machine(args.processes, settings)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with lock_folder(args.out, "--out"):
            _compare(args, settings, seeds)
    except OSError as error:
        if error.errno is None:  # A sentence already.
            raise
        raise ValueError(f"{error}; --out is {args.out}.") from None
    return 0


def _compare(args: argparse.Namespace, settings: Settings, ablation_seeds: list[int]) -> None:
    _check_same(args, settings)
    runs.processes = args.processes
    comparison = Comparison(settings, args.out)
    comparison.prepare(args.text, args.tokenizer)
    comparison.measure_models()
    results = comparison.train()
    results["ablations"] = {
        name: comparison.ablate(name, results["peers"], ablation_seeds) for name in args.ablations
    }

    from megalodon_mcore.compare import plots, report

    results["text"] = args.text
    written = json.dumps(_with_nulls(results), indent=1, allow_nan=False)
    write_text(args.out / "results.json", written + "\n")
    plots.draw(results, args.out)
    write_text(args.out / "report.md", report.page(results))
    print(f"{report.summary(results)}\n\nWritten to {args.out}: report.md, results.json, plots.")


def _with_nulls(value: Any) -> Any:
    """Without the numbers that JSON has not, which a run that diverged leaves."""
    if isinstance(value, dict):
        return {name: _with_nulls(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_machine(processes: int, settings: Settings) -> None:
    if settings.implementation == "transformer_engine" and not count_gpus():
        raise ValueError(
            "--implementation is transformer_engine, whose layers run on GPUs alone, and there is "
            "none; take local."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but compare starts the processes itself; "
            "run it once, with --processes, and not under torchrun."
        )
    if processes < 1 or settings.batch_size % (processes * settings.micro_batch_size):
        raise ValueError(
            f"--processes is {processes}, which with --micro-batch-size "
            f"{settings.micro_batch_size} is no part of --batch-size {settings.batch_size}; take "
            "numbers whose product divides it."
        )


def _check_same(args: argparse.Namespace, settings: Settings) -> None:
    """Refuses to mix two comparisons in one folder; other peers, rates and seeds may come later."""
    added = ("peers", "learning_rates", "seeds")
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in added}
    values |= {"text": args.text, "tokenizer": args.tokenizer, "processes": args.processes}
    path = args.out / "settings.json"
    before = runs.read_json(path)
    if before is None and path.exists():
        raise ValueError(f"{path} is damaged or somebody else's; give --out another folder.")
    # Where nothing was measured yet, what was refused before binds nobody.
    free = not any(args.out.glob("*/speed.job")) and before and before.keys() == values.keys()
    if before is None or free:
        if free and before != values:
            (args.out / "data" / "text_meta.json").unlink(missing_ok=True)
        write_text(path, json.dumps(values, indent=1))
        return
    for name, value in values.items():
        if before.get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {_words(value)}, but --out {args.out} holds a "
                f"comparison with {_words(before.get(name))}; give --out another folder."
            )


class Comparison:
    """The stages of one, each of which reuses what an earlier one of the same folder left."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.data: PreparedData
        self.shapes: dict[str, Shape] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.about_text: dict[str, Any] = {}

    def prepare(self, text: list[str], tokenizer: str) -> None:
        """Datasets, long validation rows, and every peer's shape, which it prints."""
        settings = self.settings
        self.data = texts.prepare(text, tokenizer, self.out / "data" / "text")
        train, valid = (
            texts.documents(self.data.datasets[name].prefix) for name in ("train", "valid")
        )
        rows, alone = texts.long_rows(valid, settings.rows, settings.longest)
        np.save(self.out / "data" / "rows.npy", rows)
        multiple = runs.VOCABULARY_MULTIPLE
        padded = -(-self.data.vocab_size // multiple) * multiple
        self.shapes = equal_shapes(settings, padded)
        self.about_text = {
            "train_tokens": self.data.datasets["train"].tokens,
            "valid_tokens": self.data.datasets["valid"].tokens,
            "rows": len(rows),
            "rows_of_one_document": alone,
            "unigram_loss": texts.unigram_loss(train, rows, padded),
        }
        for peer, shape in self.shapes.items():
            print(
                f"{peer}: {shape.layers} layers, hidden size {shape.hidden_size}, FFN "
                f"{shape.ffn_hidden_size}: {shape.parameters:,} parameters",
                flush=True,
            )

    def arguments(self, peer: str, learning_rate: float, seed: int, iterations: int) -> list[str]:
        """Of `pretrain` for a run."""
        return [
            *runs.model_arguments(self.settings, peer, self.shapes[peer]),
            *runs.training_arguments(self.settings, learning_rate, seed, iterations),
            *self.data.megatron_arguments(),
        ]

    def measure(self, peer: str, result: Path, arguments: list[str], **job: Any) -> dict:
        """As `runs.measure`, of a model of a peer's shape."""
        shape, settings = self.shapes[peer], self.settings
        keeps_scores = peer in GPTS and settings.implementation == "local"
        job |= {"window": settings.seq_length, "memory": settings.memory}
        job |= {"score_layers": shape.layers, "score_heads": shape.heads if keeps_scores else 0}
        return runs.measure(job, arguments, result, str(result.relative_to(self.out)))

    def measure_models(self) -> None:
        """Parameters as Megatron has them, operations, speed and memory by length.

        Raises:
            ValueError: a built model is not of the size that was searched for.
        """
        settings, lengths = self.settings, []
        length = settings.seq_length
        while length <= settings.longest:
            lengths.append(length)
            length *= 2
        for peer in settings.peers:
            arguments = self.arguments(peer, settings.learning_rates[0], 1, 1)
            result = self.out / _slug(peer) / "speed.json"
            found = self.measure(peer, result, arguments, lengths=tuple(lengths))
            wanted = self.shapes[peer].parameters
            if abs(found["parameters"] / wanted - 1) > TOLERANCE / 10:
                raise ValueError(
                    f"--peers has {peer}, which Megatron builds with {found['parameters']:,} "
                    f"parameters and not {wanted:,}; leave it out."
                )
            self.models[peer] = found

    def train(self) -> dict[str, Any]:
        """Sweeps, final runs and their losses by position: all results."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "text_facts": self.about_text,
            "peers": {peer: self.train_peer(peer) for peer in self.settings.peers},
        }

    def train_peer(self, peer: str) -> dict[str, Any]:
        """One model: its sweep, its runs at the best rate, and what was measured of it."""
        settings, home = self.settings, self.out / _slug(peer)
        losses = {}
        for rate in settings.learning_rates:
            folder = home / f"sweep-{rate:g}-seed-{settings.seeds[0]}"
            steps = settings.sweep_iterations
            arguments = self.arguments(peer, rate, settings.seeds[0], steps)
            losses[rate] = self.run(folder, f"{peer} sweep {rate:g}", arguments, steps)[
                "validation"
            ]
            runs.drop_checkpoint(folder)
        # A rate at which it diverged is worse than any other.
        best = min(losses, key=lambda z: losses[z] if math.isfinite(losses[z]) else math.inf)
        return {
            "shape": dataclasses.asdict(self.shapes[peer]),
            **self.models[peer],
            "sweep": [{"learning_rate": rate, "loss": losses[rate]} for rate in losses],
            "learning_rate": best,
            "seeds": [self.final(peer, home, best, seed) for seed in settings.seeds],
        }

    def ablate(
        self, name: str, peers: dict[str, dict[str, Any]], seeds: list[int]
    ) -> dict[str, Any]:
        """A model of --ablations, beside results of the peers."""
        peer, arguments, rate = ablations.parse(name)
        rate = rate or peers[peer]["learning_rate"]
        home = self.out / f"{peer}-{name}"
        found = [self.final(peer, home, rate, seed, arguments) for seed in seeds]
        return {"peer": peer, "learning_rate": rate, "seeds": found}

    def final(
        self, peer: str, home: Path, rate: float, seed: int, more: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """A run of all steps, and its losses by position."""
        name, steps = f"seed-{seed}-{rate:g}", self.settings.iterations
        arguments = [*self.arguments(peer, rate, seed, steps), *more]
        found = self.run(home / name, f"{home.name} {name}", arguments, steps)
        load = ["--load", str(home / name / "checkpoint"), "--no-load-optim", "--no-load-rng"]
        rows, result = str(self.out / "data" / "rows.npy"), home / name / "position.json"
        if runs.read_json(result) is None and runs.last_iteration(home / name) != steps:
            raise _incomplete(home / name, f"the checkpoint of step {steps}")
        return {"seed": seed} | found | self.measure(peer, result, [*arguments, *load], rows=rows)

    def run(self, folder: Path, name: str, arguments: list[str], steps: int) -> dict[str, Any]:
        """One training run: losses by step, its validation loss and a step's median seconds."""
        runs.train(folder, name, arguments, steps, self.settings.save_interval)
        found = runs.scalars(folder)
        losses = found[runs.LOSS]
        if len(losses) < steps or steps not in found[runs.VALIDATION]:
            raise _incomplete(folder, f"TensorBoard's values of all {steps} steps")
        return {
            "steps": sorted(losses),
            "losses": [losses[step] for step in sorted(losses)],
            "validation": found[runs.VALIDATION][steps],
            "seconds_per_step": statistics.median(found[runs.TIME].values()),
        }


def _incomplete(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"{folder} is done, but lacks {what}; remove that folder, and run the same command again."
    )


def _slug(peer: str) -> str:
    """A peer's folder; patterns have a character that shells read."""
    return peer.replace("*", "A")


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
