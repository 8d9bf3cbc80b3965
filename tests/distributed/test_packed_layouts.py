"""Rows packed of documents train in every layout as in one process, context parallelism first."""

from dataclasses import replace

import pytest

from distributed.layouts import Layout
from distributed.test_layouts import (
    DEEP,
    EIGHT,
    MODEL,
    ONE_HEAD,
    SMALL_MICRO_BATCHES,
    TIED,
    Case,
    assert_trains_as_one_process,
    parameters,
)

ANY = replace(MODEL, documents=1)
BY_FOUR = replace(MODEL, documents=4)
BY_EIGHT = replace(MODEL, documents=8)
OTHER_BLOCK = replace(ONE_HEAD, documents=1)
TENSOR = Layout(tp=2, sequence_parallel=True)
ORDERS = ("contiguous", "zigzag", "document_zigzag")


def in_each_order(name: str, layout: Layout, orders=ORDERS) -> dict[str, Case]:
    """The layout with documents of any length, or of one that each of them can be cut by."""
    by_cp = {2: BY_FOUR, 4: BY_EIGHT}
    return {
        f"{name}, {order}": Case(
            by_cp[layout.cp] if order == "document_zigzag" else ANY,
            replace(layout, sequence_order=order),
        )
        for order in orders
    }


COMMON = {
    **in_each_order("CP 2", Layout(cp=2)),
    **in_each_order("TP 2, SP, CP 2", replace(TENSOR, cp=2)),
    "PP 2": Case(ANY, Layout(pp=2)),
    "PP 2, CP 2": Case(ANY, Layout(pp=2, cp=2)),
    "DP 2, CP 2": Case(ANY, Layout(dp=2, cp=2)),
}
RARE = {
    **in_each_order("CP 4", Layout(cp=4)),
    **in_each_order("CP 3", Layout(cp=3), ORDERS[:2]),
    **in_each_order("TP 2, CP 2", Layout(tp=2, cp=2)),
    **in_each_order("TP 2, SP, CP 4", replace(TENSOR, cp=4)),
    **in_each_order("PP 2, CP 4", Layout(pp=2, cp=4)),
    **in_each_order("TP 2, SP, PP 2, CP 2", EIGHT),
    **in_each_order(
        "DP 2, CP 2, distributed optimizer", Layout(dp=2, cp=2, distributed_optimizer=True)
    ),
    **in_each_order("full recompute, CP 2", Layout(cp=2, recompute="full")),
    **in_each_order("selective recompute, PP 2, CP 2", Layout(pp=2, cp=2, recompute="selective")),
    "TP 2": Case(ANY, Layout(tp=2)),
    "TP 2, SP": Case(ANY, TENSOR),
    "TP 4, SP": Case(ANY, replace(TENSOR, tp=4)),
    "PP 2, TP 2, SP": Case(ANY, replace(TENSOR, pp=2)),
    "DP 2": Case(ANY, Layout(dp=2)),
    "PP 2, full recompute": Case(ANY, Layout(pp=2, recompute="full")),
    "another block, TP 4, SP, CP 2": Case(OTHER_BLOCK, replace(TENSOR, tp=4, cp=2)),
    "another block, CP 2, contiguous": Case(OTHER_BLOCK, Layout(cp=2, sequence_order="contiguous")),
    "virtual stages": Case(replace(DEEP, documents=1), Layout(pp=2, virtual_stages=2)),
    "virtual stages, CP 2": Case(replace(DEEP, documents=1), Layout(pp=2, virtual_stages=2, cp=2)),
    "rows one by one, PP 2, CP 2": Case(
        replace(SMALL_MICRO_BATCHES, documents=1), Layout(pp=2, cp=2)
    ),
    "four stages, CP 2": Case(replace(DEEP, documents=1), Layout(pp=4, cp=2)),
    "tied, PP 2, CP 2": Case(replace(TIED, documents=1), Layout(pp=2, cp=2)),
}


@pytest.mark.parametrize("case", parameters(COMMON, RARE))
def test_packed_rows_train_as_in_one_process(workers, single, case):
    assert_trains_as_one_process(workers, single, case)


def test_enough_layouts_are_packed():
    cases = [*COMMON.values(), *RARE.values()]
    assert len(cases) >= 40
    assert {case.layout.sequence_order for case in cases if case.layout.cp > 1} == {*ORDERS}
