"""`megalodon-mcore describe`: the configuration and the sizes of a named size, and of a layout."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from megalodon_mcore import accounting
from megalodon_mcore.config import CONFIG_VARIABLE, SIZES, config_from_environment, parse_config
from megalodon_mcore.planning.arguments import add_layout_arguments, layout_from
from megalodon_mcore.planning.layout import check_layout
from megalodon_mcore.planning.report import plan_lines


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
    add_layout_arguments(parser)


def run(args: Namespace) -> int:
    """Prints the configuration, parameters by part, and bytes: on one rank, or of a layout's.

    Raises:
        ValueError: --set, the environment or the layout has a value that does not fit.
    """
    size = SIZES[args.preset]
    own = size.megalodon.override(config_from_environment()).override(
        parse_config(args.set, "--set")
    )
    shape = accounting.ModelShape.of(size, args.vocab_size, own)
    layout = layout_from(args)
    if layout:
        check_layout(shape, layout)
    print(f"Megalodon {args.preset}\n\nConfiguration")
    _print_rows({**size.megatron_arguments(), "vocab_size": args.vocab_size})
    _print_rows(dataclasses.asdict(shape.megalodon))
    counts = accounting.parameters_by_part(shape)
    print("\nParameters")
    _print_rows(counts | {"total": sum(counts.values())})
    if layout:
        print("", *plan_lines(shape, layout), sep="\n")
    else:
        _print_single_rank(shape, args.dtype)
    return 0


def _print_single_rank(shape: accounting.ModelShape, dtype: str) -> None:
    bf16 = dtype == "bf16"
    training = accounting.training_bytes(shape, bf16)
    print(f"\nBytes to train in {dtype} with Adam, on one rank, activations aside")
    _print_rows(training | {"total": sum(training.values())})
    streaming = accounting.streaming_bytes(shape, bf16)
    print("\nBytes of streaming state per sequence, whatever the context length")
    _print_rows(streaming | {"total": sum(streaming.values())})


def _print_rows(rows: dict[str, object]) -> None:
    for name, value in rows.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"  {name:<38} {text!s:>20}")
