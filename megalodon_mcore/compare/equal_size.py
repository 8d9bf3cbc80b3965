"""Finds widths by which models of different layers have equally many parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megalodon_mcore.compare.presets import GPTS, MEGALODON, Settings
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.parameters import number_of_values

TOLERANCE = 0.01
"""How far a model's parameters may be from Megalodon's, relatively."""
RATIOS = (1.0, 4.0)
"""The FFN's width over the model's; beyond these a model would be a caricature of its kind."""


@dataclass(frozen=True)
class Shape:
    """A model's widths; `heads` are attention's in GPT and patterns, 0 where there is none."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    parameters: int


def gpt_parameters(layers: int, hidden_size: int, ffn_hidden_size: int, vocabulary: int) -> int:
    """Of a GPT with SwiGLU, RMSNorm and an output of its own, without biases."""
    layer = 4 * hidden_size**2 + 3 * hidden_size * ffn_hidden_size + 2 * hidden_size
    return 2 * vocabulary * hidden_size + layers * layer + hidden_size


def blocks_parameters(
    settings: Settings, pattern: str | None, hidden_size: int, ffn_hidden_size: int, vocabulary: int
) -> int:
    """Of Megalodon, alone (None) or with the other layers of a pattern."""
    layers = pattern or "M" * settings.layers
    config = MegalodonConfig(
        num_layers=len(layers),
        hidden_size=hidden_size,
        num_heads=settings.heads,
        ffn_hidden_size=ffn_hidden_size,
        chunk_size=settings.chunk_size,
        swiglu=True,
        vocab_size=vocabulary,
        layers=layers,
        normalization="RMSNorm",
        attention_heads=max(1, hidden_size // settings.head_dim),
    )
    return number_of_values(config)


def equal_shapes(settings: Settings, vocabulary: int) -> dict[str, Shape]:
    """A shape for every peer; Megalodon's is as `settings` say, and the others meet it.

    vocabulary: tokens, with padding.

    Raises:
        ValueError: there is none within TOLERANCE for a peer.
    """
    hidden, ffn = settings.hidden_size, settings.ffn_hidden_size
    try:
        target = blocks_parameters(settings, None, hidden, ffn, vocabulary)
    except ValueError as error:
        heads = f"--hidden-size is {hidden} and --heads {settings.heads}"
        raise ValueError(f"{heads}, which no Megalodon has: {error}") from None
    found = {}
    for peer in settings.peers:
        if peer == MEGALODON:
            found[peer] = Shape(settings.layers, hidden, ffn, 0, target)
            continue
        if peer in GPTS:
            layers, step = settings.layers, settings.head_dim

            def count(width: int, ffn: int) -> int:
                return gpt_parameters(settings.layers, width, ffn, vocabulary)
        else:
            # TimestepNorm's groups are 32 channels wide.
            layers, step = len(peer), math.lcm(settings.head_dim, 32)

            def count(width: int, ffn: int, pattern: str = peer) -> int:
                return blocks_parameters(settings, pattern, width, ffn, vocabulary)

        widths = range(step, 4 * hidden + 1, step)
        width, ffn_width = _search(peer, count, widths, hidden, target)
        heads = 0 if set(peer) <= set("M-") else width // settings.head_dim
        found[peer] = Shape(layers, width, ffn_width, heads, count(width, ffn_width))
    return found


def _search(
    peer: str,
    count: Callable[[int, int], int],
    widths: Iterable[int],
    hidden_size: int,
    target: int,
) -> tuple[int, int]:
    """The widths (model's, FFN's) within TOLERANCE of `target`, the former nearest to Megalodon's.

    Parameters are linear in the FFN's width.
    """
    for width in sorted(widths, key=lambda width: abs(math.log(width / hidden_size))):
        base = count(width, 64)
        slope = (count(width, 128) - base) / 64
        exact = 64 + (target - base) / slope if slope else 2 * width
        for multiple in (64, 8, 1):
            ffn = max(multiple, round(exact / multiple) * multiple)
            error = abs(count(width, ffn) / target - 1)
            if error <= TOLERANCE and RATIOS[0] <= ffn / width <= RATIOS[1]:
                return width, ffn
    raise ValueError(
        f"--hidden-size is {hidden_size}, for which no width makes {peer} as large as "
        f"Megalodon's {target:,} parameters (within {TOLERANCE:.0%}, the FFN {RATIOS[0]:g} to "
        f"{RATIOS[1]:g} times as wide as the model); take a larger --hidden-size, a smaller "
        "--head-dim or another --layers."
    )
