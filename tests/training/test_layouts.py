"""`pretrain` on several processes, and with recompute, gives the single process's numbers.

tests/distributed has more layouts, with gradients; here they go through the command.
"""

import pytest

from training.runs import DROPOUT, TINY, generate, save_to, side_by_side, train

RECOMPUTE = {
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform")
    + ("--recompute-num-layers", "1"),
    "selective": ("--recompute-granularity", "selective", "--recompute-modules")
    + ("core_attn", "mlp"),
}
LAYOUTS = {
    "pipeline 2": (2, ("--pipeline-model-parallel-size", "2")),
    "data 2, distributed optimizer": (
        2,
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "four micro-batches": (1, ("--micro-batch-size", "1")),
    "tensor 4, more than heads": (
        4,
        (
            *("--tensor-model-parallel-size", "4", "--sequence-parallel"),
            # As many padding rows in the vocabulary as a single process has.
            *("--make-vocab-size-divisible-by", "32"),
        ),
    ),
}
EVERYTHING = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--make-vocab-size-divisible-by", "64"),
    *("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2"),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that every layout starts from, the single process's run, and its checkpoint."""
    folder = tmp_path_factory.mktemp("start")
    checkpoint = folder / "checkpoint"
    train(folder / "first", *TINY, *save_to(checkpoint), "--exit-interval", "1")
    arguments = (*TINY, *from_checkpoint(checkpoint), *save_to(folder / "saved"))
    return checkpoint, train(folder / "single", *arguments), folder / "saved"


def from_checkpoint(checkpoint):
    return ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_has_the_losses_of_one_process(start, tmp_path, name):
    checkpoint, single, _ = start
    processes, options = LAYOUTS[name]
    run = train(tmp_path, *TINY, *from_checkpoint(checkpoint), *options, processes=processes)
    assert_same(run, single)


def assert_same(run, single):
    assert list(run.losses) == list(single.losses) == [2, 3, 4, 5, 6]
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.gradient_norms == pytest.approx(single.gradient_norms, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--context-parallel-size", "2"), ("--micro-batch-size", "1")],
    ids=["cut sequences", "smaller micro-batches"],
)
def test_a_seed_gives_the_same_start(tmp_path, options):
    one, two = side_by_side(
        lambda: train(tmp_path / "one", *TINY),
        lambda: train(tmp_path / "two", *TINY, *options, processes=2),
    )
    assert two.losses == pytest.approx(one.losses, rel=1e-5)


def test_masked_tokens_weigh_alike_whichever_rank_has_them(start, tmp_path):
    arguments = (*TINY, *from_checkpoint(start[0]), "--eod-mask-loss")
    single = train(tmp_path / "single", *arguments)
    assert single.losses != start[1].losses
    for order in ("contiguous", "zigzag"):
        options = ("--context-parallel-size", "2", "--megalodon-sequence-order", order)
        run = train(tmp_path / order, *arguments, *options, processes=2)
        assert_same(run, single)


@pytest.mark.slow
def test_everything_at_once(start, tmp_path):
    checkpoint, single, saved = start
    options = (*EVERYTHING, *save_to(tmp_path / "saved"))
    run = train(tmp_path / "run", *TINY, *from_checkpoint(checkpoint), *options, processes=8)
    assert_same(run, single)
    assert greedy(tmp_path / "saved") == greedy(saved)


def greedy(checkpoint):
    """What one process generates from a checkpoint."""
    result = generate(checkpoint, *("--prompt", "1 2 3", "--tokens", "40", "--temperature", "0"))
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_recompute_changes_nothing_but_rounding(tmp_path):
    """Autograd adds up a tensor's gradients in another order where a part is recomputed."""
    plain, full, selective = side_by_side(
        lambda: train(tmp_path / "plain", *TINY, *DROPOUT),
        lambda: train(tmp_path / "full", *TINY, *DROPOUT, *RECOMPUTE["full"]),
        lambda: train(tmp_path / "selective", *TINY, *DROPOUT, *RECOMPUTE["selective"]),
    )
    for recomputed in (full, selective):
        assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)
        assert recomputed.gradient_norms == pytest.approx(plain.gradient_norms, rel=1e-5)
