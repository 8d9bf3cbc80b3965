"""Where the values come from that Megatron has no argument for, and which source wins."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megalodon_mcore.config import ARGUMENT_PREFIX, KINDS, OWN, MegalodonConfig

CONFIG_VARIABLE = "MEGALODON_CONFIG"
"""Environment variable of `name=value` pairs, comma-separated."""


def settle(
    given: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None = None,
    size: MegalodonConfig | None = None,
) -> dict[str, Any]:
    """The values, by name: what a user gave, else CONFIG_VARIABLE's, a checkpoint's, the size's.

    Raises:
        ValueError: the environment variable is malformed, or a name is unknown.
    """
    for name in (*given, *(checkpoint or ())):
        if name not in OWN:
            raise ValueError(f"{name!r} is not a Megalodon value; known: {', '.join(OWN)}.")
    named = size.own_values() if size else {}
    return named | dict(checkpoint or {}) | values_in_environment() | dict(given)


def values_in_arguments(arguments: Namespace) -> dict[str, Any]:
    """Those that a namespace of Megatron's arguments holds."""
    values = {name: getattr(arguments, ARGUMENT_PREFIX + name, None) for name in OWN}
    return {name: value for name, value in values.items() if value is not None}


def values_in_environment() -> dict[str, Any]:
    """Reads CONFIG_VARIABLE, e.g. `MEGALODON_CONFIG=chunk_size=512,rescale_nffn=true`.

    Raises:
        ValueError: a pair is malformed, a name unknown, or a value of the wrong type.
    """
    text = os.environ.get(CONFIG_VARIABLE, "").strip()
    return parse_pairs(text.split(","), CONFIG_VARIABLE) if text else {}


def parse_pairs(pairs: list[str], origin: str) -> dict[str, Any]:
    """Turns `name=value` strings into typed values; `origin` names their source in errors.

    Raises:
        ValueError: as values_in_environment.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or name not in OWN:
            raise ValueError(
                f"{origin} has {pair.strip()!r}; it takes NAME=VALUE with NAME one of "
                f"{', '.join(OWN)}."
            )
        values[name] = _parse_value(name, text, origin)
    return values


def _parse_value(name: str, text: str, origin: str) -> Any:
    kind = KINDS[name]
    if kind == "str":
        return text
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return float(text) if kind == "float" else int(text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "float": "a number"}.get(kind, "an integer")
        raise ValueError(f"{origin} gives {name}={text!r}; {name} takes {wanted}.") from None
