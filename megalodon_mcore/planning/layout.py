"""A planned layout: how many ranks share the model and its sequences, from the command line."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.parallel.sequence_layout import (
    ORDERS_OF_ROWS,
    SequenceLayout,
    sequence_layout,
)

RECOMPUTE = ("none", "selective", "full")
"""Megatron's --recompute-granularity: selective with --recompute-modules core_attn mlp, and moe
where there are experts, full with --recompute-method uniform --recompute-num-layers 1."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes by Megatron's names; `seq_length` is the whole sequence, before anything cuts it."""

    seq_length: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Ranks of those cp * dp that have different experts of a layer."""
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
    def expert_gradient_ranks(self) -> int:
        """Of those, the ranks that hold the same experts."""
        return self.gradient_ranks // self.ep

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

    def stage_symbols(self, symbols: str, stage: int) -> str:
        """The layers of a pipeline stage, of a model's."""
        counts = self.layers_by_stage or (len(symbols) // self.pp,) * self.pp
        return symbols[sum(counts[:stage]) :][: counts[stage]]

    def check(self, config: MegalodonConfig) -> None:
        """Checks what no argument of Megatron's stands for; the rest is `validation`'s.

        Raises:
            ValueError: the first value that does not fit; one sentence names it and what would do.
        """
        for name in ("seq_length", "tp", "pp", "cp", "dp", "ep", "micro_batch_size"):
            value = getattr(self, name)
            if value < 1:
                argument = name.replace("_", "-")
                raise ValueError(f"--{argument} is {value}; it takes a positive integer.")
        stages, layers = self.layers_by_stage, config.num_layers
        if stages and (len(stages) != self.pp or sum(stages) != layers or min(stages) < 1):
            raise ValueError(
                f"--layers-by-stage is {' '.join(map(str, stages))}; for --pp {self.pp} it takes "
                f"{self.pp} positive integers that add up to the {layers} layers."
            )
        if self.ep > 1:
            self._check_experts(config)

    def _check_experts(self, config: MegalodonConfig) -> None:
        if not config.has("num_experts"):
            raise ValueError(f"--ep is {self.ep}, but the model has no experts; leave it out.")
        for name, ranks_or_experts in (
            ("--num-experts", config.num_experts),
            ("--dp times --cp", self.gradient_ranks),
        ):
            if ranks_or_experts % self.ep:
                raise ValueError(
                    f"--ep is {self.ep}, which does not divide {name}, {ranks_or_experts}; take a "
                    "divisor."
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
        ("ep", "Expert-parallel ranks, of those dp * cp (1)."),
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


def layout_from(args: Namespace, stages: tuple[int, ...] | None = None) -> ParallelLayout | None:
    """The planned layout; None where nothing asks for one.

    Args:
        args: with the options of `add_layout_arguments`.
        stages: the layers of each pipeline stage, where a pattern says them.

    Raises:
        ValueError: there are options but no length, or other stages than the pattern's.
    """
    names = [name for name in ParallelLayout.__dataclass_fields__ if name != "bf16"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if stages:
        if "layers_by_stage" in given:
            raise ValueError(
                f"--layers-by-stage is {' '.join(map(str, given['layers_by_stage']))}, but "
                "--hybrid-layer-pattern names the stages with |; leave one of them out."
            )
        if given.get("pp", len(stages)) != len(stages):
            raise ValueError(
                f"--pp is {given['pp']}, but --hybrid-layer-pattern has {len(stages)} stages; take "
                f"--pp {len(stages)}."
            )
        given |= {"pp": len(stages), "layers_by_stage": stages}
    if not given:
        return None
    if "seq_length" not in given:
        raise ValueError("--seq-length is missing; a layout is planned for a sequence's length.")
    if "layers_by_stage" in given:
        given["layers_by_stage"] = tuple(given["layers_by_stage"])
    return ParallelLayout(bf16=args.dtype == "bf16", **given)
