"""Bridge loads an export as `convert` does and writes it back, bit by bit, over TP and PP."""

from pathlib import Path

import pytest
import torch
from needs_bridge import needs_bridge

from conversion.conversion_samples import (
    assert_same_tensors,
    convert,
    hf_folder,
    hf_tensors,
)
from megalodon_mcore.conversion.hf_folder import open_hf
from training.runs import launch

pytestmark = [pytest.mark.bridge, needs_bridge]

PROGRAM = ("-m", "megalodon_mcore.cpu", str(Path(__file__).parent / "import_and_export.py"))
CASES = {
    "one-process": ("one-head", torch.float32, 1, 1, "local"),
    "tp2-pp2": ("swiglu-two-heads-rescale", torch.bfloat16, 2, 2, "transformer_engine"),
    "pp2-tied": ("tied-scaled-four-heads", torch.float32, 1, 2, "local"),
    "tp2-shared-head": ("one-head", torch.bfloat16, 2, 1, "local"),
}
"""A model of conversion_samples, its type, TP ranks, pipeline stages and linear layers."""


@pytest.mark.parametrize("case", CASES)
def test_an_export_comes_in_as_converted_and_goes_out_as_it_was(case, tmp_path):
    name, dtype, tp, pp, implementation = CASES[case]
    saved = hf_folder(tmp_path / "saved", name, dtype, tokenizer=True, vocab_size=257)
    export, mcore, result = (tmp_path / z for z in ("export", "mcore", "result"))
    assert convert("hf", "hf", saved, export) == 0
    # Bridge pads the vocabulary to a multiple of this.
    assert convert("hf", "mcore", export, mcore, "--make-vocab-size-divisible-by", 128 * tp) == 0

    # The program compares the weights that Bridge loads with those of the converted checkpoint.
    run = launch(
        *(
            *PROGRAM,
            str(export),
            str(mcore / "release"),
            str(result),
            str(tp),
            str(pp),
            implementation,
        ),
        processes=tp * pp,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert_same_tensors(hf_tensors(result), hf_tensors(export))
    assert open_hf(result).config == open_hf(export).config
    for file in ("modeling_megalodon.py", "configuration_megalodon.py"):
        assert (result / file).read_bytes() == (export / file).read_bytes()
