"""`megalodon-mcore describe`: the configuration and the sizes of a named size, and of a layout."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter

from megalodon_mcore.config import BLOCKS, FIELDS, MegalodonConfig
from megalodon_mcore.config_sources import CONFIG_VARIABLE, parse_pairs, settle
from megalodon_mcore.layer_options import add_layer_arguments, stages_of, with_layers
from megalodon_mcore.planning.layout import ParallelLayout, add_layout_arguments, layout_from
from megalodon_mcore.sizes import SIZES


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--preset", choices=list(SIZES), required=True, help="Named size.")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, help="Vocabulary, padding included (32000)."
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"Values over the preset's, as in the environment variable {CONFIG_VARIABLE}.",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "float32"], default="bf16", help="Training precision (bf16)."
    )
    add_layer_arguments(parser)
    add_layout_arguments(parser)


def run(args: Namespace) -> int:
    """Prints the configuration, parameters by module, and bytes: on one rank, or of a layout's.

    Raises:
        ValueError: a value of an option or the environment does not fit.
    """
    size = SIZES[args.preset]
    own = settle(parse_pairs(args.set, "--set"), size=size)
    if args.vocab_size < 1:
        raise ValueError(f"--vocab-size is {args.vocab_size}; it takes a positive integer.")
    layout = layout_from(args, stages_of(args.hybrid_layer_pattern))
    size = dataclasses.replace(size, vocab_size=args.vocab_size, **own)
    config = with_layers(size, args)
    print(f"Building {args.preset} on the meta device ...", file=sys.stderr, flush=True)
    # Both import Megatron.
    from megalodon_mcore.planning import rank, report

    single = ParallelLayout(seq_length=config.chunk_size, bf16=args.dtype == "bf16")
    with warnings.catch_warnings():
        # Of Megatron's and torch's parts about each other.
        warnings.simplefilter("ignore")
        # First of all, for what does not fit is then said alone.
        lines = list(report.plan_lines(config, layout)) if layout else []
        with rank.fake_rank(single):
            model = rank.build_stage(config, single, 0, config.symbols)

    print(f"Megalodon {args.preset}\n\nConfiguration")
    _print_rows(values_of(config))
    parts = parameters_by_module(model)
    print("\nParameters")
    _print_rows(parts | {"total": sum(parts.values())})
    if config.has("num_experts"):
        _print_rows({"active for a token": active_parameters(parts, config)})
    if layout:
        print("", *lines, sep="\n")
    else:
        _print_single_rank(model, config, single)
    return 0


def values_of(config: MegalodonConfig) -> dict[str, object]:
    """The values that say something of the model."""
    values = {name: getattr(config, name) for name in FIELDS if config.has(name)}
    return {name: value for name, value in values.items() if value is not None}


def parameters_by_module(model: object) -> Counter[str]:
    """Parameters of a model's modules, layers and a layer's experts summed."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        module, _, _ = re.sub(r"(layers|local_experts)\.\d+", r"\1", name).rpartition(".")
        counts[module] += parameter.numel()
    return counts


def active_parameters(parts: Counter[str], config: MegalodonConfig) -> int:
    """Of a model's parameters by module, those that one token meets: its experts and all else."""
    in_experts = sum(count for name, count in parts.items() if ".local_experts." in name)
    idle = config.num_experts - config.experts_per_token
    return sum(parts.values()) - in_experts * idle // config.num_experts


def streaming_bytes(config: MegalodonConfig, bf16: bool) -> dict[str, int]:
    """Bytes of state that generation holds per sequence, at most, whatever the context length.

    That is of blocks and the final norm; attention's comes on top.
    """
    layers = sum(symbol in BLOCKS for symbol in config.symbols)
    return {
        # Mean and variance in float64. The final norm has its own.
        "TimestepNorm": (layers + 1) * 2 * config.norm_num_groups * 8,
        "CEMA": layers * config.hidden_size * config.cema_ndim * 8,
        "keys and values": layers
        * config.chunk_size
        * (config.z_dim + config.value_dim)
        * (2 if bf16 else 4),
    }


def growing_bytes(config: MegalodonConfig, bf16: bool) -> int:
    """Bytes of keys and values that generation adds with every token of the context."""
    if not config.has("attention_heads"):
        return 0
    width = 2 * config.attention_groups * config.attention_head_dim
    return config.symbols.count("*") * width * (2 if bf16 else 4)


def _print_single_rank(model: object, config: MegalodonConfig, layout: ParallelLayout) -> None:
    from megalodon_mcore.planning.measure import model_bytes, numbers_of

    dtype = "bf16" if layout.bf16 else "float32"
    training = model_bytes(numbers_of(model), layout)
    print(f"\nBytes to train in {dtype} with Adam, on one rank, activations aside")
    _print_rows(training | {"total": sum(training.values())})
    streaming = streaming_bytes(config, layout.bf16)
    print("\nBytes of streaming state per sequence, whatever the context length")
    _print_rows(streaming | {"total": sum(streaming.values())})
    if growing := growing_bytes(config, layout.bf16):
        print("\nBytes of attention's keys and values, on top")
        _print_rows({"for every token of the context": growing})


def _print_rows(rows: dict[str, object]) -> None:
    for name, value in rows.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"  {name:<38} {text!s:>{max(0, 20 - max(0, len(name) - 38))}}")
