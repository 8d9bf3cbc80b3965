"""A planned layout: how many ranks share the model and its sequences, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass

from megalodon_mcore.accounting import BYTES_BFLOAT16, BYTES_FLOAT32, ModelShape
from megalodon_mcore.parallel.sequence_layout import (
    SEQUENCE_ORDERS,
    SequenceLayout,
    context_parallel_layout,
    sequence_parallel_layout,
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
    def tokens(self) -> int:
        """Tokens of a micro-batch inside a tensor-parallel group: L/cp * B."""
        return self.seq_length // self.cp * self.micro_batch_size

    @property
    def residual_tokens(self) -> int:
        """Tokens of a micro-batch whose residual stream a rank holds: L/cp * B, over tp with SP."""
        return self.tokens // self.tp if self.splits_residual else self.tokens

    @property
    def activation_bytes(self) -> int:
        """Bytes of one number of the hidden states."""
        return BYTES_BFLOAT16 if self.bf16 else BYTES_FLOAT32

    def context_layout(self) -> SequenceLayout:
        """The positions of every context-parallel rank."""
        return context_parallel_layout(self.order, self.cp, self.seq_length // self.cp)

    def residual_layout(self) -> SequenceLayout:
        """The positions whose residual stream every rank holds: cp ranks, or cp * tp with SP."""
        layout = self.context_layout()
        return sequence_parallel_layout(layout, self.tp) if self.splits_residual else layout

    def stage_layers(self, shape: ModelShape, stage: int) -> int:
        """Layers of a pipeline stage."""
        return self.layers_by_stage[stage] if self.layers_by_stage else shape.num_layers // self.pp

    def micro_batches_in_flight(self, stage: int) -> int:
        """Micro-batches of which a stage keeps activations under 1F1B, at most."""
        return self.pp - stage


def head_ranks(shape: ModelShape, layout: ParallelLayout) -> int:
    """Tensor-parallel ranks that share a head's queries and keys: tp / H, at least 1."""
    return max(1, layout.tp // shape.megalodon.num_heads)


def check_layout(shape: ModelShape, layout: ParallelLayout) -> None:
    """Checks that the model and its sequences can be cut so.

    Raises:
        ValueError: the first value that does not fit; one sentence names it and what would work.
    """
    _check_values(layout)
    _check_tensor_parallel(shape, layout.tp)
    _check_pipeline_parallel(shape, layout)
    _check_sequence(layout)


def _check_values(layout: ParallelLayout) -> None:
    for name in ("seq_length", "tp", "pp", "cp", "dp", "micro_batch_size"):
        value = getattr(layout, name)
        if value < 1:
            argument = name.replace("_", "-")
            raise ValueError(f"--{argument} is {value}; it takes a positive integer.")
    for name, known in (("recompute", RECOMPUTE), ("order", SEQUENCE_ORDERS)):
        value = getattr(layout, name)
        if value not in known:
            raise ValueError(f"--{name} is {value!r}; it takes {', '.join(known)}.")


def _check_tensor_parallel(shape: ModelShape, tp: int) -> None:
    heads = shape.megalodon.num_heads
    if heads % tp and tp % heads:
        raise ValueError(
            f"--tensor-model-parallel-size is {tp} and there are {heads} heads; take a divisor or "
            f"a multiple of {heads}."
        )
    for name, width in (
        ("--hidden-size", shape.hidden_size),
        ("value_dim", shape.megalodon.value_dim),
        ("--ffn-hidden-size", shape.ffn_hidden_size),
        ("the padded vocabulary", shape.vocab_size),
    ):
        if width % tp:
            raise ValueError(
                f"--tensor-model-parallel-size is {tp}, which does not divide {name} {width}; "
                "take a size that does."
            )


def _check_pipeline_parallel(shape: ModelShape, layout: ParallelLayout) -> None:
    layers, pp, by_stage = shape.num_layers, layout.pp, layout.layers_by_stage
    if by_stage is None:
        if layers % pp:
            raise ValueError(
                f"--pipeline-model-parallel-size is {pp}, which does not divide --num-layers "
                f"{layers}; take a divisor of {layers} or uneven stages."
            )
    elif len(by_stage) != pp or sum(by_stage) != layers or min(by_stage) < 1:
        raise ValueError(
            f"the stages have {' + '.join(map(str, by_stage))} layers; for "
            f"--pipeline-model-parallel-size {pp} and --num-layers {layers} take {pp} positive "
            f"numbers that add up to {layers}."
        )


def _check_sequence(layout: ParallelLayout) -> None:
    length, cp = layout.seq_length, layout.cp
    zigzag = layout.order == "zigzag" and cp > 1
    parts = 2 * cp if zigzag else cp
    if length % parts:
        raise ValueError(
            f"--seq-length is {length}, which {layout.order} order with --context-parallel-size "
            f"{cp} cuts into {parts} equal parts; take a multiple of {parts}."
        )
    if layout.splits_residual and length // cp % layout.tp:
        raise ValueError(
            f"--seq-length is {length}, so a context-parallel rank has {length // cp} positions, "
            f"which --tensor-model-parallel-size {layout.tp} does not divide; with "
            f"--sequence-parallel take a multiple of {cp * layout.tp}."
        )
