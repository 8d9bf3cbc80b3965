"""The values of a comparison: one table, of which a preset is a column."""

from __future__ import annotations

import dataclasses
import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from typing import Any

MEGALODON, GPT, WINDOW, HE = "megalodon", "gpt", "gpt-window", "gpt-he"
GPTS = (GPT, WINDOW, HE)
MOST_SEED = 2**31 - 1
"""Of Megatron's generators of random numbers."""


def _value(help: str, default: Any, **presets: Any) -> Any:
    """A value with its help, its default (that of `short`) and what other presets have."""
    about = {"help": help, "presets": presets}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=about | {"item": type(default[0])})
    return field(default=default, metadata=about | {"item": type(default)})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison finds; the text and the machine aside."""

    peers: tuple[str, ...] = _value(
        f"models: {MEGALODON}, {GPT}, {WINDOW} (sliding-window attention), {HE} (GPT whose weights "
        "start with Megalodon's deviations and not with Megatron's 0.02); --patterns adds more",
        (MEGALODON, HE),
        gpu=(MEGALODON, GPT, HE),
    )
    layers: int = _value("layers of Megalodon and GPT", 4, gpu=12)
    hidden_size: int = _value("Megalodon's width", 128, laptop=256, gpu=1024, tiny=64)
    ffn_hidden_size: int = _value("Megalodon's FFN width", 256, laptop=384, gpu=1792, tiny=96)
    chunk_size: int = _value("Megalodon's attention chunk", 128, laptop=256, gpu=1024, tiny=16)
    heads: int = _value("Megalodon's heads", 1)
    head_dim: int = _value("width of GPT's and a pattern's attention heads", 32, gpu=64, tiny=16)
    window: int = _value(f"positions that {WINDOW} sees", 128, laptop=256, gpu=1024, tiny=16)
    seq_length: int = _value("training length in tokens", 512, laptop=2048, gpu=4096, tiny=64)
    batch_size: int = _value("sequences of a step", 8, laptop=4, gpu=16, tiny=4)
    micro_batch_size: int = _value("sequences at once in a process", 8, laptop=4, gpu=2, tiny=4)
    iterations: int = _value("steps of a final run", 300, laptop=400, gpu=600, tiny=24)
    sweep_iterations: int = _value("steps of a sweep's run", 75, laptop=60, gpu=100, tiny=10)
    learning_rates: tuple[float, ...] = _value(
        "peak learning rates that every model tries",
        (1e-3, 3e-3, 1e-2),
        laptop=(3e-4, 1e-3, 3e-3, 1e-2),
        gpu=(3e-4, 1e-3, 3e-3),
    )
    seeds: tuple[int, ...] = _value(
        "seeds of the final runs (first values and order of the data)",
        (1, 2),
        laptop=(1, 2, 3),
        gpu=(1, 2),
    )
    save_interval: int = _value("steps between checkpoints", 50, laptop=25, gpu=100, tiny=8)
    precision: str = _value("float32 or bf16", "float32", gpu="bf16")
    implementation: str = _value(
        "Megatron's --transformer-impl, of every model: local or transformer_engine", "local"
    )
    times_longer: int = _value("times the training length to evaluate at", 16, tiny=4)
    rows: int = _value("validation texts of that length", 12, laptop=8, gpu=16, tiny=2)
    memory: float = _value(
        "GiB that attention's scores may take; a length that needs more is left out",
        4.0,
        laptop=8.0,
        gpu=40.0,
    )

    @property
    def longest(self) -> int:
        """Positions of a validation text."""
        return self.seq_length * self.times_longer


FIELDS = {each.name: each for each in dataclasses.fields(Settings)}
PRESETS = {
    "short": "two cores, about 20 minutes",
    "laptop": "two cores, about three hours, 3M parameters",
    "gpu": "one H100, about an hour, Megalodon-200M's width",
    "gpu-short": "one H100, five minutes: gpu with fewer steps",
    "tiny": "a try of seconds a run, whose numbers mean nothing",
}


def preset(name: str) -> Settings:
    """A preset's values."""
    column = name.partition("-")[0]
    found = Settings(
        **{
            z.name: z.metadata["presets"][column]
            for z in FIELDS.values()
            if column in z.metadata["presets"]
        }
    )
    if name == "gpu-short":
        short = {"iterations": 60, "sweep_iterations": 15, "seeds": (1,), "rows": 4}
        return dataclasses.replace(found, **short)
    return found


def add_arguments(parser: ArgumentParser) -> None:
    """Adds an option for every value."""
    for name, each in FIELDS.items():
        several = isinstance(getattr(Settings(), name), tuple)
        parser.add_argument(
            _option(name),
            type=each.metadata["item"],
            nargs="+" if several else None,
            metavar=name.upper(),
            help=each.metadata["help"],
        )


def settings_from(args: Namespace, patterns: list[str]) -> Settings:
    """The preset's values under those that were given, checked.

    Raises:
        ValueError: one sentence names the argument, its value and what would work.
    """
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    given = {name: tuple(z) if isinstance(z, list) else z for name, z in given.items()}
    found = dataclasses.replace(preset(args.preset), **given)
    peers = tuple(dict.fromkeys((*found.peers, *patterns)))
    found = dataclasses.replace(found, peers=peers)
    _check(found, patterns)
    return found


def _check(settings: Settings, patterns: list[str]) -> None:
    from megalodon_mcore.hybrid import check_pattern

    for name in FIELDS:
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not 0 < one < math.inf:
                raise ValueError(f"{_option(name)} is {one}; it takes a positive number.")
        # As runs' folders have them.
        words = _words(value) if isinstance(value, tuple) else []
        if len(set(words)) < len(words):
            raise ValueError(f"{_option(name)} is {' '.join(words)}; give each once.")
    for name in ("iterations", "sweep_iterations"):
        if getattr(settings, name) < 2:
            # Of a process' first step nobody takes the time.
            raise ValueError(f"{_option(name)} is {getattr(settings, name)}; it takes at least 2.")
    if max(settings.seeds) > MOST_SEED:
        raise ValueError(f"--seeds is {max(settings.seeds)}; it takes numbers to {MOST_SEED}.")
    if settings.head_dim % 2:
        raise ValueError(f"--head-dim is {settings.head_dim}; RoPE takes pairs, an even number.")
    known = (MEGALODON, *GPTS)
    for peer in settings.peers:
        if peer not in known and peer not in patterns:
            raise ValueError(
                f"--peers is {peer}; it takes {', '.join(known)}, and --patterns takes MM*M."
            )
    for pattern in patterns:
        try:
            check_pattern(pattern, 1)
        except ValueError as error:
            raise ValueError(str(error).replace("--hybrid-layer-pattern", "--patterns")) from None
        if set(pattern) - set("M*-"):
            raise ValueError(
                f"--patterns is {pattern}, but equal parameters and one process are compared here; "
                "it takes M (a block), * (attention) and - (MLP), as in MM*M."
            )
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise ValueError(
                f"{_option(name)} is {getattr(settings, name)}; it takes {' or '.join(choices)}."
            )
    if settings.implementation != "local" and WINDOW in settings.peers:
        raise ValueError(
            f"--peers is {WINDOW}, which is compared with Megatron's own layers alone; take "
            "--implementation local."
        )
    _check_lengths(settings)


CHOICES = {
    "precision": ("float32", "bf16"),
    "implementation": ("local", "transformer_engine"),
}


def _check_lengths(settings: Settings) -> None:
    length, chunk = settings.seq_length, settings.chunk_size
    if length % chunk:
        raise ValueError(
            f"--seq-length is {length}, of which --chunk-size {chunk} is no part; take "
            f"{-(-length // chunk) * chunk}."
        )
    times = settings.times_longer
    if times & (times - 1):
        raise ValueError(f"--times-longer is {times}; it takes a power of two, such as 16.")
    if settings.batch_size % settings.micro_batch_size:
        raise ValueError(
            f"--batch-size is {settings.batch_size}, no multiple of --micro-batch-size "
            f"{settings.micro_batch_size}."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(values: tuple) -> list[str]:
    return [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
