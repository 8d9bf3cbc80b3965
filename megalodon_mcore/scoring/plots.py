"""Plots of an evaluation's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_positions(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Nats per token and bits per byte over the position in a document.

    Args:
        rows: of `PositionBins.rows`.
        title: the figure's.
        path: the .png file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for own, name in zip(axes, ("nats_per_token", "bits_per_byte"), strict=True):
        known = [row for row in rows if row[name] is not None]
        # Position 0 has no logarithm: bins are drawn at their first position plus one.
        own.plot([row["first"] + 1 for row in known], [row[name] for row in known], "o-")
        own.set_xscale("log", base=2)
        own.set_xlabel("tokens read, the first of each bin")
        own.set_ylabel(name.replace("_", " "))
        own.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)


def plot_retrieval(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A heat map of accuracy for each task: depths over lengths.

    Args:
        rows: of `retrieval.table`.
        title: the figure's.
        path: the .png file.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length_bytes"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    size = (2 + len(tasks) * (2 + 0.7 * len(lengths)), 2 + 0.5 * len(depths))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for own, task in zip(axes[0], tasks, strict=True):
        grid = [[float("nan")] * len(lengths) for _ in depths]
        tokens: dict[int, list[float]] = {}
        for row in (row for row in rows if row["task"] == task):
            line, column = depths.index(row["depth"]), lengths.index(row["length_bytes"])
            grid[line][column] = row["accuracy"]
            tokens.setdefault(row["length_bytes"], []).append(row["mean_prompt_tokens"])
            color = "white" if row["accuracy"] > 0.6 else "black"
            text = f"{row['accuracy']:.0%}"
            own.text(column, line, text, ha="center", va="center", color=color)
        image = own.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        means = [sum(tokens[length]) / len(tokens[length]) for length in lengths]
        labels = [f"{n:,}\n({mean:,.0f})" for n, mean in zip(lengths, means, strict=True)]
        own.set_xticks(range(len(lengths)), labels)
        own.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        own.set(title=task, xlabel="bytes (tokens) of the prompt", ylabel="depth")
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)
