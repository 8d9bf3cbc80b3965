"""The plots of a comparison: loss against what it costs, speed and memory, loss by position."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_mcore.compare.numbers import costs, final_loss, smoothed
from megalodon_mcore.compare.report import label
from megalodon_mcore.whole_file import write_whole

AXES = {"tokens": "tokens", "seconds": "seconds of steps", "petaflops": "petaflops"}


def draw(results: dict[str, Any], out: Path) -> None:
    """Writes loss.png, speed.png and position.png."""
    from matplotlib.figure import Figure

    colors = {peer: f"C{place}" for place, peer in enumerate(results["peers"])}
    for name, plot, count in (
        ("loss", _losses, 4),
        ("speed", _speed, 2),
        ("position", _positions, 2),
    ):
        figure = Figure(figsize=(5 * count, 4.2), layout="tight")
        axes = figure.subplots(1, count)
        for peer, found in results["peers"].items():
            plot(axes, results, found, color=colors[peer], label=label(results, peer))
        _finish(name, axes, results)
        write_whole(out / f"{name}.png", functools.partial(figure.savefig, dpi=120))


def _losses(axes: Any, results: dict, peer: dict, color: str, label: str) -> None:
    for place, seed in enumerate(peer["seeds"]):
        losses, step = smoothed(seed["losses"]), costs(results, peer)
        for axis, cost in zip(axes, AXES, strict=False):
            spent = np.array(seed["steps"]) * step[cost]
            axis.plot(spent, losses, color=color, linewidth=1, label=None if place else label)
    final = [final_loss({"seeds": [seed]}).mean for seed in peer["seeds"]]
    where = list(results["peers"].values()).index(peer)
    axes[3].plot([where] * len(final), final, "o", color=color)
    axes[3].hlines(final_loss(peer).mean, where - 0.2, where + 0.2, color=color)


def _speed(axes: Any, results: dict, peer: dict, color: str, label: str) -> None:
    timed = [z for z in peer["speed"] if "seconds" in z]
    lengths = [z["length"] for z in timed]
    axes[0].plot(
        lengths, [z["length"] / z["seconds"] for z in timed], "o-", color=color, label=label
    )
    axes[1].plot(lengths, [z["bytes"] / 2**20 for z in timed], "o-", color=color, label=label)


def _positions(axes: Any, results: dict, peer: dict, color: str, label: str) -> None:
    size = peer["seeds"][0]["bin"]
    reached = min(len(seed["whole"]) for seed in peer["seeds"])
    whole, windowed = (
        np.mean([seed[name][:reached] for seed in peer["seeds"]], axis=0)
        for name in ("whole", "windowed")
    )
    # Means of so many bins that a curve has 16 points in every training length.
    width = max(1, results["settings"]["seq_length"] // (16 * size))
    cut = reached // width * width
    positions = (np.arange(cut // width) + 0.5) * width * size
    with np.errstate(invalid="ignore"):  # Of a run that diverged.
        over = whole - windowed
    for axis, values in zip(axes, (whole, over), strict=True):
        axis.plot(positions, values[:cut].reshape(-1, width).mean(1), color=color, label=label)
    axes[1].plot(positions[-1:], over[:cut][-width:].mean(), "x", color=color)


def _finish(name: str, axes: Any, results: dict[str, Any]) -> None:
    if name == "loss":
        for axis, words in zip(axes, AXES.values(), strict=False):
            axis.set(xlabel=words, ylabel="training loss, nats per token")
            axis.axhline(results["text_facts"]["unigram_loss"], color="grey", linestyle=":")
        names = [label(results, peer) for peer in results["peers"]]
        axes[3].set_xticks(range(len(names)), [name.replace(" with", "\nwith") for name in names])
        axes[3].set(xlim=(-0.5, len(names) - 0.5), ylabel="validation loss, each seed and mean")
    elif name == "speed":
        axes[0].set(xlabel="length in tokens", ylabel="tokens a second, forward and backward")
        axes[1].set(xlabel="length in tokens", ylabel="memory, MiB", yscale="log")
    else:
        length = results["settings"]["seq_length"]
        axes[0].set(xlabel="position in the text", ylabel="validation loss, nats per token")
        axes[1].set(
            xlabel="position in the text",
            ylabel=f"loss minus that in windows of {length:,}, nats",
        )
        for axis in axes:
            axis.axvline(length, color="grey", linestyle=":")
            axis.set(xlim=(length / 16, None))
    for axis in axes:
        if name != "loss":
            axis.set_xscale("log", base=2)
        axis.legend() if axis.get_legend_handles_labels()[0] else None
