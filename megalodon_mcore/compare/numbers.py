"""What follows from a comparison's results: losses at equal cost, spreads, losses by context."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Any, NamedTuple

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Standard errors beyond which 5% of equal things differ, by degrees of freedom from 1 on; of more
degrees the last, which is a little more than it takes."""
FAILS = 0.1
"""Nats by which a longer context than trained with may harm before it is said to fail."""
PETA = 1e15


class Spread(NamedTuple):
    """A mean over seeds and their sample standard deviation, None of one seed.

    Both are no numbers where a seed diverged.
    """

    mean: float
    deviation: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


class Difference(NamedTuple):
    """Of two spreads: theirs over ours, and how far seeds alone may bring equal models apart, in 19
    of 20 comparisons; None where one has no spread."""

    value: float
    bound: float | None

    @property
    def winner(self) -> int | None:
        """1 where the first is lower (ahead), -1 where the second is, 0 where seeds do not tell
        them apart; None where nothing is known."""
        if self.bound is None or not math.isfinite(self.value):
            return None
        if abs(self.value) <= self.bound:
            return 0
        return 1 if self.value > 0 else -1


def spread(values: list[float]) -> Spread:
    """Of one number a seed."""
    finite = all(map(math.isfinite, values))
    deviation = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None
    return Spread(statistics.mean(values) if finite else math.nan, deviation, len(values))


def difference(ours: Spread, theirs: Spread) -> Difference:
    """How much lower ours is."""
    value = theirs.mean - ours.mean
    if ours.deviation is None or theirs.deviation is None:
        return Difference(value, None)
    if not math.isfinite(value):
        return Difference(value, None)
    # Welch's test: deviations need not be equal.
    variances = [z.deviation**2 / z.seeds for z in (ours, theirs)]
    if not sum(variances):
        return Difference(value, 0.0)
    each = sum(v**2 / (z.seeds - 1) for v, z in zip(variances, (ours, theirs), strict=True))
    degrees = min(int(sum(variances) ** 2 / each + 1e-9), len(STUDENT))
    return Difference(value, STUDENT[degrees - 1] * math.sqrt(sum(variances)))


def diverged(peer: dict[str, Any]) -> list[int]:
    """Seeds in which its loss ended as no number."""
    return [
        seed["seed"]
        for seed in peer["seeds"]
        if not math.isfinite(seed["validation"] + sum(seed["windowed"]) + sum(seed["whole"]))
    ]


def final_loss(peer: dict[str, Any]) -> Spread:
    """Validation loss at the training length, nats per token."""
    return spread([statistics.mean(seed["windowed"]) for seed in peer["seeds"]])


def costs(results: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """What a step of a model costs: tokens, seconds and petaflops.

    A step takes the same whatever the seed: in the least disturbed run, so long.
    """
    settings = results["settings"]
    tokens = settings["batch_size"] * settings["seq_length"]
    return {
        "tokens": tokens,
        "seconds": min(seed["seconds_per_step"] for seed in peer["seeds"]),
        "petaflops": tokens * peer["flops_per_token"] / PETA,
    }


def smoothed(losses: list[float]) -> list[float]:
    """The mean of each loss and those before it, a twentieth of the run in all."""
    width = max(1, len(losses) // 20)
    return [statistics.mean(losses[max(0, z - width + 1) : z + 1]) for z in range(len(losses))]


def loss_at(results: dict[str, Any], peer: dict[str, Any], cost: str, at: float) -> Spread:
    """Smoothed training loss once `at` tokens, seconds or petaflops are spent."""
    found = []
    for seed in peer["seeds"]:
        done = int(at / costs(results, peer)[cost] + 1e-6)
        until = sum(step <= done for step in seed["steps"])
        found.append(smoothed(seed["losses"])[max(0, until - 1)])
    return spread(found)


def least_cost(results: dict[str, Any], peers: list[dict[str, Any]], cost: str) -> float:
    """The most that every run of these has spent."""
    return min(
        costs(results, peer)[cost] * seed["steps"][-1] for peer in peers for seed in peer["seeds"]
    )


class Context(NamedTuple):
    """Positions from `start` up to `stop`, and what a context from the first position on gives."""

    start: int
    stop: int
    whole: float
    gain: float
    """Nats that it is below the same tokens' loss in windows of the training length."""


def contexts(results: dict[str, Any], peer: dict[str, Any]) -> list[Context]:
    """By doublings of the training length, as far as the model could be evaluated."""
    length, longest = results["settings"]["seq_length"], min(z["reached"] for z in peer["seeds"])
    bounds = [0, length]
    while bounds[-1] * 2 <= longest:
        bounds.append(bounds[-1] * 2)
    found = []
    for start, stop in pairwise(bounds):
        whole, windowed = (
            statistics.mean(
                statistics.mean(seed[name][start // seed["bin"] : stop // seed["bin"]])
                for seed in peer["seeds"]
            )
            for name in ("whole", "windowed")
        )
        found.append(Context(start, stop, whole, windowed - whole))
    return found


def fails_at(found: list[Context]) -> Context | None:
    """The first context that harms by more than FAILS."""
    return next((one for one in found if one.gain < -FAILS), None)
