"""Bridge moves and trains layers beside blocks, and blocks with experts, over any ranks."""

from pathlib import Path

import pytest
from needs_bridge import needs_bridge

from training.runs import launch, scalars

pytestmark = [pytest.mark.bridge, needs_bridge]

PROGRAM = ("-m", "megalodon_mcore.cpu", str(Path(__file__).parent / "mixed_layers.py"))
CASES = {
    "one-process": ("MM*-ME*", 1, 1, 1, "local"),
    "tp2": ("MM*-ME*", 2, 1, 1, "local"),
    "pp2-grouped-experts": ("MM*-|ME*", 1, 2, 1, "transformer_engine"),
    "ep2": ("M*ME", 1, 1, 2, "local"),
    "tp2-ep2-grouped-experts": ("M*-E", 2, 1, 2, "transformer_engine"),
    "experts-in-blocks": ("MX", 1, 2, 1, "local"),
    "ep2-grouped-experts-in-some-blocks": ("XM*", 1, 1, 2, "transformer_engine"),
}
"""A pattern, TP ranks, pipeline stages, EP ranks and linear layers."""


@pytest.mark.parametrize("case", CASES)
def test_tensors_come_in_by_ranks_and_go_out_as_they_were(case):
    pattern, tp, pp, ep, implementation = CASES[case]
    run = launch(*PROGRAM, pattern, *map(str, (tp, pp, ep)), implementation, processes=tp * pp * ep)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.parametrize(
    ("layers", "processes", "layout"),
    [("M*-ME", 1, ()), ("MX", 2, ("expert_model_parallel_size=2",))],
)
def test_bridges_loop_trains_them(layers, processes, layout, tmp_path):
    program = str(Path(__file__).parent / "mixed_training.py")
    run = launch(program, layers, str(tmp_path), *layout, processes=processes)
    assert run.returncode == 0, run.stdout[-6000:]
    losses = scalars(tmp_path, "lm loss")
    assert losses[20] < 0.2 * losses[1]
