"""Models that are another in one thing alone, to see what it is worth; not models to train with.

Each has its model's arguments of `pretrain` and some more. A missing part of Megalodon is a spec of
ablated_specs.py, so that no other model can ask for it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megalodon_mcore.compare.presets import GPT, MEGALODON, Settings

SPECS = "megalodon_mcore.compare.ablated_specs"
INIT_MODES = ("bert", "xavier", "gaussian")
KINDS = (
    "no-cema, no-timestep-norm (LayerNorm in its place), chunk-N, "
    f"init-{'|'.join(INIT_MODES)}, lr-X, and of GPT gpt-init-DEVIATION and gpt-lr-X"
)
PATTERN = re.compile(
    r"no-(?P<part>cema|timestep-norm)|chunk-(?P<chunk>[1-9]\d*)"
    rf"|init-(?P<mode>{'|'.join(INIT_MODES)})"
    r"|gpt-init-(?P<deviation>[\d.e-]+)|(?P<gpt>gpt-)?lr-(?P<rate>[\d.e-]+)"
)


class Ablation(NamedTuple):
    """What is another, and than in which peer."""

    peer: str
    arguments: tuple[str, ...] = ()
    """Of `pretrain`, after the peer's."""
    learning_rate: float | None = None
    """None for the peer's best."""


def parse(name: str) -> Ablation:
    """The ablation that a word of --ablations names.

    Raises:
        ValueError: it names none.
    """
    if (found := PATTERN.fullmatch(name)) is None:
        raise ValueError(f"--ablations has {name}; it takes {KINDS}.")
    own = {key: value for key, value in found.groupdict().items() if value is not None}
    for key in {"deviation", "rate"} & own.keys():
        own[key] = _positive(name, own[key])
    if "part" in own:
        spec = f"no_{own['part'].replace('-', '_')}"
        return Ablation(MEGALODON, ("--spec", SPECS, spec))
    if "chunk" in own:
        return Ablation(MEGALODON, ("--megalodon-chunk-size", own["chunk"]))
    if "mode" in own:
        return Ablation(MEGALODON, ("--megalodon-init-mode", own["mode"]))
    if "deviation" in own:
        return Ablation(GPT, ("--init-method-std", f"{own['deviation']:g}"))
    return Ablation(GPT if "gpt" in own else MEGALODON, (), own["rate"])


def _positive(name: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"--ablations has {name}; {word} is no positive number, such as 0.05.")
    return value


def check(names: list[str], seeds: list[int], settings: Settings) -> None:
    """Refuses what cannot be set beside a peer.

    Raises:
        ValueError: one sentence names the argument, its value and what would work.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"--ablations is {' '.join(names)}; give each once.")
    for name in names:
        one = parse(name)
        if one.peer not in settings.peers:
            raise ValueError(f"--ablations has {name}, but --peers has no {one.peer}; add it.")
        if one.arguments[:1] == ("--megalodon-chunk-size",):
            chunk = int(one.arguments[1])
            if settings.seq_length % chunk:
                raise ValueError(
                    f"--ablations has {name}, of which --seq-length {settings.seq_length} is no "
                    "multiple; take a chunk that divides it."
                )
    for seed in seeds:
        if seed not in settings.seeds:
            raise ValueError(
                f"--ablation-seeds has {seed}, but --seeds is {' '.join(map(str, settings.seeds))};"
                " take some of these, in which the models to compare with are trained."
            )
