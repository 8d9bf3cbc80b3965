"""A planned layout: how many ranks share the model and its sequences, from the command line."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass

from megalodon_mcore.parallel.sequence_layout import (
    ORDERS_OF_ROWS,
    SequenceLayout,
    sequence_layout,
)

RECOMPUTE = ("none", "selective", "full")
"""Megatron's --recompute-granularity: selective with --recompute-modules core_attn mlp, full with
--recompute-method uniform --recompute-num-layers 1."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes by Megatron's names; `seq_length` is the whole sequence, before anything cuts it."""

    seq_length: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batch_size: int = 1
    sequence_parallel: bool = True
    order: str = "contiguous"
    bf16: bool = True
    distributed_optimizer: bool = True
    recompute: str = "none"
    layers_by_stage: tuple[int, ...] | None = None
    """Layers of each pipeline stage; None for equal ones."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def gradient_ranks(self) -> int:
        """Ranks that hold the same parameters and add up their gradients: dp * cp."""
        return self.dp * self.cp

    @property
    def splits_residual(self) -> bool:
        """Whether tensor-parallel ranks hold different positions of the residual stream."""
        return self.sequence_parallel and self.tp > 1

    @property
    def residual_length(self) -> int:
        """Positions whose residual stream a rank holds: L/cp, over tp with sequence parallelism."""
        return self.seq_length // self.cp // (self.tp if self.splits_residual else 1)

    def context_layout(self) -> SequenceLayout:
        """The positions of every context-parallel rank."""
        return sequence_layout(self.order, self.cp, 1, (0, self.seq_length))

    def stage_layers(self, num_layers: int, stage: int) -> int:
        """Layers of a pipeline stage."""
        return self.layers_by_stage[stage] if self.layers_by_stage else num_layers // self.pp

    def check(self, num_layers: int) -> None:
        """Checks what no argument of Megatron's stands for; the rest is `validation`'s.

        Raises:
            ValueError: the first value that does not fit; one sentence names it and what would do.
        """
        for name in ("seq_length", "tp", "pp", "cp", "dp", "micro_batch_size"):
            value = getattr(self, name)
            if value < 1:
                argument = name.replace("_", "-")
                raise ValueError(f"--{argument} is {value}; it takes a positive integer.")
        stages = self.layers_by_stage
        if stages and (len(stages) != self.pp or sum(stages) != num_layers or min(stages) < 1):
            raise ValueError(
                f"--layers-by-stage is {' '.join(map(str, stages))}; for --pp {self.pp} it takes "
                f"{self.pp} positive integers that add up to the {num_layers} layers."
            )


def add_layout_arguments(parser: ArgumentParser) -> None:
    """Adds the options of a planned layout; all are None where they are not given."""
    group = parser.add_argument_group(
        "planned layout", "With any of these, prints memory and traffic of each stage's ranks."
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
    group.add_argument("--order", choices=ORDERS_OF_ROWS, help="How CP cuts (contiguous).")
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
