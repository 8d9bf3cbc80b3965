"""The layout's part of `megalodon-mcore describe`'s command line."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from megalodon_mcore.parallel.sequence_layout import SEQUENCE_ORDERS
from megalodon_mcore.planning.layout import RECOMPUTE, ParallelLayout


def add_layout_arguments(parser: ArgumentParser) -> None:
    """Adds the options of a planned layout; all are None where they are not given."""
    group = parser.add_argument_group(
        "planned layout", "With any of these, prints memory and traffic per rank from formulas."
    )
    for name, meaning in (
        ("tp", "Tensor-parallel ranks (1)."),
        ("pp", "Pipeline stages (1)."),
        ("cp", "Context-parallel ranks (1)."),
        ("dp", "Data-parallel replicas (1)."),
        ("seq-length", "Tokens of a sequence, the whole of it; needed for a plan."),
        ("micro-batch-size", "Sequences in a micro-batch (1)."),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)
    group.add_argument("--order", choices=SEQUENCE_ORDERS, help="How CP cuts (contiguous).")
    group.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        help="Run forward again in backward: nothing of it, attention and FFN, all (none).",
    )
    group.add_argument(
        "--layers-by-stage",
        type=int,
        nargs="+",
        metavar="LAYERS",
        help="Layers of each pipeline stage (equal).",
    )
    for name, meaning in (
        ("sequence-parallel", "Split the residual stream over TP ranks too (yes, with --tp)."),
        ("distributed-optimizer", "Shard Adam's state over dp * cp ranks (yes)."),
    ):
        group.add_argument(f"--{name}", action=BooleanOptionalAction, help=meaning)


def layout_from(args: Namespace) -> ParallelLayout | None:
    """The planned layout; None where no option asks for one.

    Raises:
        ValueError: there are options but no length.
    """
    names = [name for name in ParallelLayout.__dataclass_fields__ if name != "bf16"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not given:
        return None
    if "seq_length" not in given:
        raise ValueError("--seq-length is missing; a layout is planned for a sequence's length.")
    if "layers_by_stage" in given:
        given["layers_by_stage"] = tuple(given["layers_by_stage"])
    return ParallelLayout(bf16=args.dtype == "bf16", **given)
