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
from hf.mixed_models import build_mixed
from megalodon_mcore.conversion.hf_folder import CODE, open_hf
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from training.runs import launch

pytestmark = [pytest.mark.bridge, needs_bridge]

PROGRAM = ("-m", "megalodon_mcore.cpu", str(Path(__file__).parent / "import_and_export.py"))
CASES = {
    "one-process": ("one-head", torch.float32, 1, 1, "local"),
    "tp2-pp2": ("swiglu-two-heads-rescale", torch.bfloat16, 2, 2, "transformer_engine"),
    "pp2-tied": ("tied-scaled-four-heads", torch.float32, 1, 2, "local"),
    "tp2-shared-head": ("one-head", torch.bfloat16, 2, 1, "local"),
    "tp2-attention": ("*M-", torch.float32, 2, 1, "local"),
    "pp2-experts-apart": ("M*ME", torch.bfloat16, 1, 2, "local"),
    "tp2-experts-in-blocks": ("MX", torch.float32, 2, 1, "local"),
}
"""A model of conversion_samples or a pattern of layers, its type, TP ranks, pipeline stages and
linear layers."""


@pytest.mark.parametrize("case", CASES)
def test_an_export_comes_in_as_converted_and_goes_out_as_it_was(case, tmp_path):
    name, dtype, tp, pp, implementation = CASES[case]
    saved = tmp_path / "saved"
    if name.isupper() or "*" in name:
        write_byte_tokenizer(saved)
        experts = {} if name == "*M-" else {"num_experts": 4}
        build_mixed(name, vocab_size=257, **experts).to(dtype).save_pretrained(saved)
    else:
        hf_folder(saved, name, dtype, tokenizer=True, vocab_size=257)
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
    for file in CODE:
        assert (result / file).read_bytes() == (export / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "tp"), [("one-head", 1), ("swiglu-two-heads-rescale", 2), ("*M-", 2)]
)
def test_adapters_are_merged_into_an_export(name, tp, tmp_path):
    saved, export = tmp_path / "saved", tmp_path / "export"
    if "*" in name:
        write_byte_tokenizer(saved)
        build_mixed(name, vocab_size=257).save_pretrained(saved)
    else:
        hf_folder(saved, name, tokenizer=True, vocab_size=257, swiglu=True)
    assert convert("hf", "hf", saved, export) == 0
    program = Path(__file__).parent / "merge_adapters.py"
    arguments = (str(program), str(export), str(tmp_path / "result"), str(tp))
    run = launch("-m", "megalodon_mcore.cpu", *arguments, processes=tp)
    assert run.returncode == 0, run.stdout[-6000:]
