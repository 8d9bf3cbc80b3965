"""What every format says about a model in its own words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megalodon_mcore.config import MegalodonConfig

MAX_LAYERS = 10_000
"""More are a damaged number, of which no list can be made."""


@dataclass(frozen=True)
class Architecture:
    """A model's shape and the numbers that its forward pass depends on.

    vocab_size is the tokenizer's: padding that Megatron adds is no part of the model.

    Raises:
        ValueError: a value does not fit; one sentence names it.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    z_dim: int
    value_dim: int
    cema_ndim: int
    norm_num_groups: int
    chunk_size: int
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_embedding: bool = False
    tied: bool = False
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_mode: str = "he"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = {"int": int, "float": (int, float), "bool": bool, "str": str}[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type != "bool"):
                raise ValueError(f"{field.name} is {value!r}; it takes a value of {field.type}.")
            if field.type == "int" and value >= 2**31:
                raise ValueError(f"{field.name} is {value}; it takes less than 2**31.")
        for name in ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a positive integer.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; it takes {MAX_LAYERS} at most.")
        for name in ("rotary_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a positive number.")
        self.megalodon_values().resolve(self.hidden_size, self.num_heads)

    def megalodon_values(self) -> MegalodonConfig:
        """What Megatron has no argument for."""
        names = (field.name for field in dataclasses.fields(MegalodonConfig))
        return MegalodonConfig(**{name: getattr(self, name) for name in names})


def architecture_from(values: dict[str, Any], names: dict[str, str], origin: str) -> Architecture:
    """Renames a configuration's values.

    Args:
        values: the configuration.
        names: its names, by Architecture's. One that is absent or None leaves the default.
        origin: the configuration's file, for errors.

    Raises:
        ValueError: a value is missing, of the wrong type, or does not fit the others.
    """
    found = {
        ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None
    }
    for field in dataclasses.fields(Architecture):
        if field.name not in found and field.default is dataclasses.MISSING:
            raise ValueError(f"{origin} does not say {names.get(field.name, field.name)}.")
    try:
        return Architecture(**found)
    except ValueError as error:
        raise ValueError(f"{origin} describes no model: {error}") from None
