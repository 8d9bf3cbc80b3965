"""A checkpoint of one layout goes on in another with the losses of never having stopped."""

from dataclasses import dataclass, replace

import pytest

from distributed.layouts import Layout, Model
from distributed.training import train

ONE = Layout()
EIGHT = Layout(tp=2, sequence_parallel=True, pp=2, cp=2)
MODEL = Model(swiglu=True)
ONE_HEAD = Model(heads=1).with_megalodon(rescale_nffn=True)
DEEP = Model(num_layers=4)
MUON = Model(swiglu=True, optimizer="muon")
# Clipping would go by a norm that stages sum in another order, which flips what bf16 rounds.
BF16 = Model(bf16=True, clip_grad=100.0)


@dataclass(frozen=True)
class Move:
    """Training that stops in one layout and goes on in another."""

    model: Model
    written: Layout
    read: Layout


COMMON = {
    "TP 2, SP, PP 2, CP 2 to one": Move(MODEL, EIGHT, ONE),
    "one to TP 2, SP, PP 2, CP 2": Move(MODEL, ONE, EIGHT),
    "one head, TP 4 to TP 2": Move(ONE_HEAD, Layout(tp=4, sequence_parallel=True), Layout(tp=2)),
    "distributed optimizer, DP 2 to TP 2, CP 2": Move(
        MODEL,
        Layout(dp=2, distributed_optimizer=True, bucket_size=None),
        Layout(tp=2, cp=2, distributed_optimizer=True),
    ),
    "distributed optimizer in several buckets, DP 2 to one": Move(
        MODEL, Layout(dp=2, distributed_optimizer=True), Layout(distributed_optimizer=True)
    ),
    "Muon, shared heads, TP 4 to one": Move(MUON, Layout(tp=4, sequence_parallel=True), ONE),
}
RARE = {
    "Muon, one to TP 2, PP 2": Move(MUON, ONE, Layout(tp=2, pp=2)),
    "Muon, bf16, PP 2 to one": Move(
        replace(BF16, swiglu=True, optimizer="muon"), Layout(pp=2), ONE
    ),
    "PP 2 to TP 2": Move(MODEL, Layout(pp=2), Layout(tp=2)),
    "PP 2, virtual, to PP 2": Move(DEEP, Layout(pp=2, virtual_stages=2), Layout(pp=2)),
    "PP 2 to PP 2, virtual": Move(DEEP, Layout(pp=2), Layout(pp=2, virtual_stages=2)),
    "tied, TP 2 to PP 2": Move(Model(tied=True), Layout(tp=2), Layout(pp=2)),
    "distributed optimizer, one head, TP 4 to DP 2": Move(
        ONE_HEAD,
        Layout(tp=4, sequence_parallel=True, distributed_optimizer=True, bucket_size=None),
        Layout(dp=2, distributed_optimizer=True),
    ),
    # A tied embedding has a bucket of its own.
    "distributed optimizer, tied, PP 2 to one": Move(
        Model(tied=True),
        Layout(pp=2, distributed_optimizer=True, bucket_size=None),
        Layout(distributed_optimizer=True),
    ),
    # Neither layout adds up anything in another order, so bf16 rounds as in one process.
    "bf16, PP 2 to DP 2": Move(BF16, Layout(pp=2), Layout(dp=2)),
    "bf16, distributed optimizer, DP 2 to PP 2": Move(
        BF16,
        Layout(dp=2, distributed_optimizer=True, bucket_size=None),
        Layout(pp=2, distributed_optimizer=True),
    ),
}
MOVES = [pytest.param(move, id=name) for name, move in COMMON.items()] + [
    pytest.param(move, id=name, marks=pytest.mark.slow) for name, move in RARE.items()
]


@pytest.mark.parametrize("move", MOVES)
def test_losses_go_on(workers, single, tmp_path, move):
    start, uninterrupted = single(move.model)
    first = workers.run(
        move.written.world_size, train, move.model, move.written, start, steps=1, save=tmp_path
    )
    second = workers.run(
        move.read.world_size, train, move.model, move.read, tmp_path, steps=2, resume=True
    )
    for ranks, losses in ((first, uninterrupted.losses[:1]), (second, uninterrupted.losses[1:])):
        for rank in ranks:
            assert rank.losses == pytest.approx(losses, rel=1e-5)
