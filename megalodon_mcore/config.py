"""Megalodon's own hyperparameters, the named sizes, and where their values come from.

What Megatron has an argument for (layers, hidden size, heads, FFN width, norm epsilon, dropouts,
SwiGLU, RoPE base, tied embeddings) stays Megatron's; this module holds only the rest.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

CONFIG_VARIABLE = "MEGALODON_CONFIG"
"""Environment variable of `field=value` pairs, comma-separated, over the named size's values."""

INIT_MODES = ("he", "bert", "xavier", "gaussian")


@dataclass(frozen=True)
class MegalodonConfig:
    """Values that Megatron has no argument for; None stands for a value derived from hidden_size.

    Names follow the released configuration (github XuezheMax/megalodon, megalodon/config.py).
    """

    num_heads: int | None = None
    """Attention heads; --num-attention-heads. Megatron wants that argument to be a multiple of
    --tensor-model-parallel-size, while ranks can share a Megalodon head."""

    chunk_size: int = 2048
    """Positions an attention chunk spans; nothing attends across chunks."""

    z_dim: int | None = None
    """Width of the shared representation that queries and keys come from; hidden_size / 4."""

    value_dim: int | None = None
    """Width of the attention values and their gate; 2 * hidden_size."""

    cema_ndim: int = 16
    """EMA dimensions per channel (N)."""

    norm_num_groups: int | None = None
    """Groups of TimestepNorm; hidden_size / 32, at most 64."""

    rescale_nffn: bool = False
    """Multiply the FFN's output by a learned vector that starts at 0.1 * 0.5^layer."""

    scale_embedding: bool = False
    """Multiply the embedding by sqrt(hidden_size)."""

    hidden_dropout: float = 0.0
    """Dropout on the mixer's and the FFN's hidden activations. Megatron's --hidden-dropout is
    another one: Megalodon's `dropout`, on the embedding and on both residual updates."""

    init_mode: str = "he"
    """How projections start: he, bert, xavier or gaussian."""

    def resolve(self, hidden_size: int, num_attention_heads: int) -> ResolvedMegalodonConfig:
        """Fills in what follows from the hidden size and checks every value.

        Raises:
            ValueError: a value does not fit; one sentence names it and what would work.
        """
        groups = min(64, max(1, hidden_size // 32))
        derived = {
            "z_dim": hidden_size // 4,
            "value_dim": 2 * hidden_size,
            "norm_num_groups": groups,
            "num_heads": num_attention_heads,
        }
        values = dataclasses.asdict(self)
        values.update({name: derived[name] for name in derived if values[name] is None})
        resolved = ResolvedMegalodonConfig(**values)
        _check(resolved, hidden_size)
        return resolved

    def override(self, values: dict[str, Any]) -> MegalodonConfig:
        """A copy with these fields replaced.

        Raises:
            ValueError: a name is not a field.
        """
        known = [field.name for field in dataclasses.fields(MegalodonConfig)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name!r} is not a Megalodon value; known: {', '.join(known)}.")
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class ResolvedMegalodonConfig(MegalodonConfig):
    """A MegalodonConfig in which every width is a number."""

    num_heads: int
    z_dim: int
    value_dim: int
    norm_num_groups: int


def _check(config: ResolvedMegalodonConfig, hidden_size: int) -> None:
    num_heads = config.num_heads
    for name in ("num_heads", "chunk_size", "z_dim", "value_dim", "cema_ndim", "norm_num_groups"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it takes a positive integer.")
    for name in ("z_dim", "value_dim"):
        if getattr(config, name) % num_heads:
            raise ValueError(
                f"{name} is {getattr(config, name)}, which the {num_heads} heads "
                f"(--num-attention-heads) do not divide; take a multiple of {num_heads}."
            )
    if (config.z_dim // num_heads) % 2:
        raise ValueError(
            f"z_dim is {config.z_dim}, so a head is {config.z_dim // num_heads} wide; RoPE rotates "
            f"pairs, so take a multiple of {2 * num_heads}."
        )
    if hidden_size % config.norm_num_groups:
        raise ValueError(
            f"norm_num_groups is {config.norm_num_groups}, which does not divide --hidden-size "
            f"{hidden_size}."
        )
    if not 0.0 <= config.hidden_dropout < 1.0:
        raise ValueError(
            f"hidden_dropout is {config.hidden_dropout}; it takes a number from 0 up to below 1."
        )
    if config.init_mode not in INIT_MODES:
        raise ValueError(f"init_mode is {config.init_mode!r}; it takes {', '.join(INIT_MODES)}.")


@dataclass(frozen=True)
class MegalodonSize:
    """A named size: the Megatron arguments it goes with and Megalodon's own values."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    swiglu: bool
    rotary_base: int
    tied_embeddings: bool
    megalodon: MegalodonConfig

    def megatron_arguments(self) -> dict[str, Any]:
        """The values by the names that Megatron's argument parser gives them."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "ffn_hidden_size": self.ffn_hidden_size,
            "swiglu": self.swiglu,
            "rotary_base": self.rotary_base,
            "untie_embeddings_and_output_weights": not self.tied_embeddings,
        }


def _paper_size(
    num_layers: int,
    hidden_size: int,
    heads: int,
    ffn: int,
    groups: int,
    *,
    swiglu: bool = False,
    chunk_size: int = 2048,
    rotary_base: int = 10_000,
    tied_and_scaled: bool = False,
) -> MegalodonSize:
    return MegalodonSize(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        swiglu=swiglu,
        rotary_base=rotary_base,
        tied_embeddings=tied_and_scaled,
        megalodon=MegalodonConfig(
            chunk_size=chunk_size,
            z_dim=hidden_size // 4,
            value_dim=2 * hidden_size,
            norm_num_groups=groups,
            scale_embedding=tied_and_scaled,
        ),
    )


SIZES: dict[str, MegalodonSize] = {
    "200m": _paper_size(12, 1024, 1, 2560, 32),
    "1.3b": _paper_size(24, 2048, 2, 4864, 64),
    "1.3b-pg19": _paper_size(24, 2048, 2, 3584, 64, swiglu=True, tied_and_scaled=True),
    "7.1b": _paper_size(32, 4096, 4, 11264, 64),
    "7.3b": _paper_size(32, 4096, 4, 8192, 64, swiglu=True),
    "7b-paper": _paper_size(
        32, 4096, 4, 8192, 64, swiglu=True, chunk_size=4096, rotary_base=100_000
    ),
}
"""The released ModelStore's sizes, and the 7B of the paper's experiments."""


def config_from_environment() -> dict[str, Any]:
    """Reads CONFIG_VARIABLE, e.g. `MEGALODON_CONFIG=chunk_size=512,rescale_nffn=true`.

    Raises:
        ValueError: a pair is malformed, a name unknown, or a value of the wrong type.
    """
    text = os.environ.get(CONFIG_VARIABLE, "").strip()
    return parse_config(text.split(","), CONFIG_VARIABLE) if text else {}


def parse_config(pairs: list[str], origin: str) -> dict[str, Any]:
    """Turns `field=value` strings into typed values; `origin` names their source in errors.

    Raises:
        ValueError: as config_from_environment.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(MegalodonConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or name not in fields:
            raise ValueError(
                f"{origin} has {pair.strip()!r}; it takes NAME=VALUE with NAME one of "
                f"{', '.join(fields)}."
            )
        values[name] = _parse_value(name, text, fields[name], origin)
    return values


def _parse_value(name: str, text: str, kind: str, origin: str) -> Any:
    if kind == "str":
        return text
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return float(text) if kind == "float" else int(text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "float": "a number"}.get(kind, "an integer")
        raise ValueError(f"{origin} gives {name}={text!r}; {name} takes {wanted}.") from None
