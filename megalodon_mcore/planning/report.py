"""The tables that `megalodon-mcore describe` prints of a planned layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megalodon_mcore.config import SYMBOLS, MegalodonConfig
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.measure import Measured, measure_plan, memory, step_traffic

NAME_WIDTH = 40
COLUMN_WIDTH = 30
BOTH_WAYS = ("forward", "backward and recompute")


def plan_lines(config: MegalodonConfig, layout: ParallelLayout) -> Iterator[str]:
    """The whole report, line by line; arguments and errors are measure_plan's."""
    plan = measure_plan(config, layout)
    yield from _heading(layout, plan.cp_rank)
    if config.has("num_experts"):
        yield "  every expert of a layer gets as many tokens as any other, by all-to-all"
    held = {stage: layout.stage_symbols(config.symbols, stage) for stage in plan.stages}
    all_differ = len(plan.stages) == layout.pp
    names = {stage: _stage_name(stage, layout.pp, all_differ) for stage in plan.stages}
    columns = [names[stage] for stage in plan.stages]

    yield from _header("Of a rank", columns)
    yield _row("layers", [str(len(symbols)) for symbols in held.values()])
    for symbol in dict.fromkeys(config.symbols) if config.layers else ():
        counts = [str(symbols.count(symbol)) for symbols in held.values()]
        yield _row(f"  {symbol}, {SYMBOLS[symbol]}", counts)
    numbers = [measured.numbers.total() for measured in plan.stages.values()]
    yield _row("parameters", [f"{number:,}" for number in numbers])
    yield _row(
        "micro-batches in flight, at most", [str(layout.pp - stage) for stage in plan.stages]
    )

    yield from _header("Bytes per rank", columns)
    yield from _rows([memory(measured, layout, stage) for stage, measured in plan.stages.items()])
    for symbol, layer in plan.layers.items():
        one = f"one {symbol}" if config.layers else "one layer"
        yield from _header(f"Kept of {one} and micro-batch, by module", ["bytes per rank"])
        yield from _rows([layer.kept])
        yield from _header(f"Sent per rank, {one} and micro-batch", BOTH_WAYS)
        yield from _sent(layer, with_calls=True)
    for stage, measured in plan.stages.items():
        yield from _header(f"Sent per micro-batch, {names[stage]}", BOTH_WAYS)
        yield from _sent(measured)
    yield from _header("Sent once per step", columns)
    yield from _rows([step_traffic(measured, layout) for measured in plan.stages.values()])


def readable(size: int) -> str:
    """Bytes as `1,234,567 (1.2 MiB)`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size:,} ({value:.1f} {unit})" if unit != "B" else f"{size:,}"


def _stage_name(stage: int, stages: int, all_differ: bool) -> str:
    if stages == 1:
        return "every rank"
    if all_differ and stages > 2:
        return f"stage {stage}"
    return {0: "first stage", stages - 1: "last stage"}.get(stage, "second stage")


def _heading(layout: ParallelLayout, cp_rank: int) -> Iterator[str]:
    sequence = "with" if layout.splits_residual else "without"
    yield (
        f"Layout: {layout.ranks:,} ranks = TP {layout.tp} x PP {layout.pp} x CP {layout.cp} x DP "
        f"{layout.dp}, {sequence} sequence parallelism"
        + (f", experts over {layout.ep} ranks" if layout.ep > 1 else "")
    )
    spans = layout.context_layout().spans[cp_rank]
    positions = " and ".join(f"{span.start:,}..{span.stop - 1:,}" for span in spans)
    yield (
        f"  sequence of {layout.seq_length:,} in {layout.order} order; measured on "
        f"context-parallel rank {cp_rank}, which holds {positions}"
    )
    yield (
        f"  micro-batch {layout.micro_batch_size}, recompute {layout.recompute}, "
        f"{'bf16' if layout.bf16 else 'float32'}, "
        f"{'with' if layout.distributed_optimizer else 'without'} the distributed optimizer"
    )


def _sent(measured: Measured, with_calls: bool = False) -> Iterator[str]:
    ways = (measured.forward, measured.backward)
    calls = (measured.forward_calls, measured.backward_calls)
    for key in {**ways[0], **ways[1]}:
        cells = [readable(sent[key]) for sent in ways]
        if with_calls:
            cells = [f"{times[key]} x, {cell}" for times, cell in zip(calls, cells, strict=True)]
        yield _row(" over ".join(key), cells)
    yield _row("total", [readable(sent.total()) for sent in ways])


def _header(title: str, columns: Iterable[str]) -> Iterator[str]:
    yield ""
    yield _row(title, columns, indent="")


def _rows(columns: list[dict[str, int]]) -> Iterator[str]:
    for name in dict.fromkeys(name for column in columns for name in column):
        yield _row(name, [readable(column.get(name, 0)) for column in columns])
    yield _row("total", [readable(sum(column.values())) for column in columns])


def _row(name: str, cells: Iterable[str], indent: str = "  ") -> str:
    line = indent + name
    for column, cell in enumerate(cells, start=1):
        line += cell.rjust(NAME_WIDTH + column * COLUMN_WIDTH - len(line))
    return line
