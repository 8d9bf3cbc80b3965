"""The unmodified pretrain_hybrid.py of a Megatron-LM checkout, through the CPU stand-in."""

import os
from pathlib import Path

import pytest

from training.runs import TINY, save_to, train
from training.test_hybrid import EXPERTS, PIPELINE, pattern
from training.test_packed_data import PADDING, TENSOR, assert_same
from training.test_stock_script import COMMON

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
SCRIPT = ("-m", "megalodon_mcore.cpu", str(Path(CHECKOUT) / "pretrain_hybrid.py"))
LAYOUTS = {
    "MMMM": (1, "MMMM", ()),
    "tensor": (2, "MM*M", (*TENSOR, *PADDING)),
    "pipeline": (2, "MM|*M", PIPELINE),
    "context": (2, "MM*M", ("--context-parallel-size", "2")),
    "experts": (2, "M*ME", (*EXPERTS, "--expert-model-parallel-size", "2")),
    "experts in blocks": (2, "MM", (*EXPERTS, "--expert-model-parallel-size", "2")),
    "further predictions": (2, "M|M/M", PIPELINE),
    "all": (8, "MM|*M", (*TENSOR, *PADDING, *PIPELINE, "--context-parallel-size", "2")),
}

pytestmark = [
    pytest.mark.megatron_lm,
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"),
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_patterns_train_like_our_own_pretrain(tmp_path, name):
    processes, symbols, options = LAYOUTS[name]
    experts = EXPERTS if EXPERTS[0] in options else ()
    arguments = (*TINY, *pattern(symbols.replace("|", "")), *experts)
    checkpoint = tmp_path / "checkpoint"
    train(tmp_path / "first", *arguments, *save_to(checkpoint), "--exit-interval", "1")
    load = ("--load", str(checkpoint), "--no-load-optim", "--no-load-rng")
    single = train(tmp_path / "ours", *arguments, *load)
    # The script does not know the last two, which are Megalodon's heads.
    *theirs, _option, heads = pattern(symbols)
    run = train(
        tmp_path / "theirs",
        *(
            *COMMON,
            "--normalization",
            "RMSNorm",
            *("--no-rope-fusion", "--disable-bias-linear"),
            *theirs,
            *load,
            *options,
        ),
        *("--spec", "megalodon_mcore.spec", "megalodon_hybrid"),
        program=SCRIPT,
        processes=processes,
        MEGALODON_CONFIG=f"chunk_size=16,num_heads={heads}",
    )
    assert_same(run, single)
