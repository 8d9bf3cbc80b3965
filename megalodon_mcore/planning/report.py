"""The tables that `megalodon-mcore describe` prints of a planned layout."""

from __future__ import annotations

from collections.abc import Iterator

from megalodon_mcore.accounting import ModelShape, total_parameters
from megalodon_mcore.planning import activations, traffic
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.parameters import count, model_bytes, stage_parameters

NAME_WIDTH = 40
COLUMN_WIDTH = 32


def plan_lines(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    """The whole report, line by line; the layout has passed `check_layout`."""
    yield from _heading(layout)
    yield from _parameters(shape, layout)
    yield from _memory(shape, layout)
    yield from _layer_activations(shape, layout)
    yield from _layer_traffic(shape, layout)
    yield from _comparison(shape, layout)
    yield from _traffic(shape, layout)


def readable(size: int) -> str:
    """Bytes as `1,234,567 (1.2 MiB)`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size:,} ({value:.1f} {unit})" if unit != "B" else f"{size:,}"


def stage_columns(layout: ParallelLayout) -> dict[str, int]:
    """The pipeline stages worth a column, by name: those between first and last are alike."""
    if layout.pp == 1:
        return {"every rank": 0}
    middle = {"second stage": 1} if layout.pp > 2 else {}
    return {"first stage": 0} | middle | {"last stage": layout.pp - 1}


def _heading(layout: ParallelLayout) -> Iterator[str]:
    sequence = "with" if layout.splits_residual else "without"
    yield f"Layout: {layout.ranks:,} ranks = TP {layout.tp} x PP {layout.pp} x CP {layout.cp}" + (
        f" x DP {layout.dp}, {sequence} sequence parallelism"
    )
    segments = layout.context_layout().segments[0]
    positions = " and ".join(f"{segment.start:,}..{segment.stop - 1:,}" for segment in segments)
    yield (
        f"  sequence of {layout.seq_length:,} in {layout.order} order; the first context-parallel "
        f"rank holds {positions}"
    )
    yield (
        f"  micro-batch {layout.micro_batch_size}, recompute {layout.recompute}, "
        f"{'bf16' if layout.bf16 else 'float32'}, "
        f"{'with' if layout.distributed_optimizer else 'without'} the distributed optimizer"
    )


def _parameters(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    columns = stage_columns(layout)
    yield from _header("Parameters per rank", list(columns))
    held = [stage_parameters(shape, layout, stage) for stage in columns.values()]
    yield _row("layers", [f"{layout.stage_layers(shape, stage)}" for stage in columns.values()])
    yield _row("parameters", [f"{count(parameters):,}" for parameters in held])
    copies = [sum(p.numel for p in parameters.values() if p.copies > 1) for parameters in held]
    yield _row("  that other ranks of the model hold too", [f"{numbers:,}" for numbers in copies])
    yield f"  {total_parameters(shape):,} in the whole model"


def _memory(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    columns = stage_columns(layout)
    yield from _header("Bytes per rank", list(columns))
    by_stage = [memory(shape, layout, stage) for stage in columns.values()]
    yield from _rows(by_stage)
    yield _row("total", [readable(sum(terms.values())) for terms in by_stage])
    in_flight = [str(layout.micro_batches_in_flight(stage)) for stage in columns.values()]
    yield _row("micro-batches in flight, at most", in_flight)


def memory(shape: ModelShape, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes of a rank of this stage at its fullest, by what they are."""
    held = model_bytes(stage_parameters(shape, layout, stage), layout)
    kept = activations.stage_activations(shape, layout, stage)
    return held | {f"activations: {name}": size for name, size in kept.items()}


def _layer_activations(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    yield from _header("Activations of one layer and micro-batch", ["bytes per rank"])
    terms = activations.layer_activations(shape, layout)
    yield from _rows([terms])
    yield _row("total", [readable(sum(terms.values()))])


def _layer_traffic(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    yield from _header(
        "Sent per rank, one layer and micro-batch", ["forward", "backward and recompute"]
    )
    terms = traffic.layer_traffic(shape, layout)
    yield from _both_ways(terms)
    yield _row("total", _sum_both_ways(terms))


def _comparison(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    yield from _header(
        "For comparison, the same of other schemes", ["forward", "backward and recompute"]
    )
    schemes = {"TP: Megatron's GPT layer": traffic.gpt_hidden_states(shape, layout)}
    if layout.cp > 1:
        schemes["CP: all-to-all of activations"] = traffic.all_to_all(shape, layout)
        waiting = traffic.chain_length(layout)
        schemes[f"CP: CEMA states in a chain of {waiting}"] = traffic.chain(shape, layout)
    yield from _both_ways(schemes)


def _traffic(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    for name, stage in stage_columns(layout).items():
        yield from _header(f"Sent per micro-batch, {name}", ["forward", "backward and recompute"])
        terms = traffic.stage_traffic(shape, layout, stage)
        yield from _both_ways(terms)
        yield _row("total", _sum_both_ways(terms))
    columns = stage_columns(layout)
    yield from _header("Sent once per step", list(columns))
    by_stage = [traffic.step_traffic(shape, layout, stage) for stage in columns.values()]
    yield from _rows(by_stage)
    yield _row("total", [readable(sum(terms.values())) for terms in by_stage])


def _both_ways(terms: dict[str, traffic.Traffic]) -> Iterator[str]:
    for name, sent in terms.items():
        yield _row(name, [readable(sent.forward), readable(sent.backward)])


def _sum_both_ways(terms: dict[str, traffic.Traffic]) -> list[str]:
    return [
        readable(sum(sent.forward for sent in terms.values())),
        readable(sum(sent.backward for sent in terms.values())),
    ]


def _header(title: str, columns: list[str]) -> Iterator[str]:
    yield ""
    yield _row(title, columns, indent="")


def _rows(columns: list[dict[str, int]]) -> Iterator[str]:
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        yield _row(name, [readable(column.get(name, 0)) for column in columns])


def _row(name: str, cells: list[str], indent: str = "  ") -> str:
    return f"{indent + name:<{NAME_WIDTH + 2}}" + "".join(
        f"{cell:>{COLUMN_WIDTH}}" for cell in cells
    )
