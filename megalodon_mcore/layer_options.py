"""Layers beside Megalodon blocks, and blocks with experts, from the command line.

The options have the names of Megatron's arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
from argparse import ArgumentParser, Namespace

from megalodon_mcore.config import FIELDS, KINDS, SYMBOLS, MegalodonConfig, layers_of

VALUES = {name: field.metadata for name, field in FIELDS.items() if field.metadata["symbols"]}
"""The values that say something of these layers alone."""


def add_layer_arguments(parser: ArgumentParser) -> None:
    """Adds the pattern and the values of its layers; all are None where they are not given."""
    group = parser.add_argument_group(
        "other layers", "By Megatron's names; M blocks have experts (X) where the pattern has no E."
    )
    group.add_argument(
        "--hybrid-layer-pattern",
        metavar="PATTERN",
        help="The layers, such as 'MM*M|MM-E', in place of the preset's: M is a block, * attention "
        "over whole documents, - an MLP, E experts, | between pipeline stages.",
    )
    group.add_argument(
        "--moe-layer-freq",
        metavar="N",
        help="Of how many blocks the first one has experts, or a list as '[0]+[1]*23' (1).",
    )
    for name, metadata in VALUES.items():
        kind, default = KINDS[name], FIELDS[name].default
        options = {
            "dest": metadata["megatron"],
            "help": f"Of {_listed(metadata['symbols'])}"
            + ("." if default in (None, False) else f" ({default})."),
        }
        if kind == "bool":
            options |= {"action": "store_true", "default": None}
        else:
            options |= {"type": {"int": int, "float": float, "str": str}[kind]}
            options |= {"choices": metadata["choices"]} if metadata["choices"] else {}
            options |= {"metavar": None if metadata["choices"] else kind.upper()}
        group.add_argument(_option(metadata["megatron"]), **options)


def with_layers(size: MegalodonConfig, args: Namespace) -> MegalodonConfig:
    """A size with the layers and the values that were given.

    Raises:
        ValueError: the pattern is none, or a value does not fit; one sentence names it.
    """
    given = {name: getattr(args, metadata["megatron"]) for name, metadata in VALUES.items()}
    given = {name: value for name, value in given.items() if value is not None}
    pattern, frequency = args.hybrid_layer_pattern, args.moe_layer_freq
    if pattern is not None:
        # It imports Megatron.
        from megalodon_mcore.hybrid import check_pattern

        check_pattern(pattern, given.get("num_experts"))
        if "/" in pattern:
            raise ValueError(
                f"--hybrid-layer-pattern is {pattern}, of which no layers that predict further "
                f"tokens are described; take {pattern.partition('/')[0]}."
            )
    if frequency is not None and ("num_experts" not in given or "E" in (pattern or "")):
        raise ValueError(
            f"--moe-layer-freq is {frequency}, which is for --num-experts in blocks, where "
            "--hybrid-layer-pattern has no E; leave it out."
        )
    layers = layers_of(
        pattern, size.num_layers, given.get("num_experts"), _frequency(frequency or "1")
    )
    for name, value in given.items():
        symbols = VALUES[name]["symbols"]
        if not set(symbols) & set(layers):
            option = _option(VALUES[name]["megatron"])
            option += " is set" if value is True else f" is {value}"
            raise ValueError(
                f"{option}, which is for {_listed(symbols)}, and the model has none; leave it out."
            )
    return dataclasses.replace(size, num_layers=len(layers), layers=layers, **given)


def stages_of(pattern: str | None) -> tuple[int, ...] | None:
    """The layers of each pipeline stage, where a pattern says them."""
    stages = (pattern or "").split("|")
    return tuple(map(len, stages)) if len(stages) > 1 else None


def _frequency(text: str) -> int | list[int]:
    from megatron.training.arguments import moe_freq_type

    try:
        frequency = moe_freq_type(text)
    except (ValueError, AssertionError, SyntaxError, argparse.ArgumentTypeError):
        frequency = 0
    if isinstance(frequency, int) and frequency < 1:
        raise ValueError(
            f"--moe-layer-freq is {text}; it takes a positive integer or a list of 0 and 1, such "
            "as '[0]+[1]*23'."
        )
    return frequency


def _option(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def _listed(symbols: str) -> str:
    return ", ".join(f"{SYMBOLS[symbol]} ({symbol})" for symbol in symbols)
