"""Models with layers beside the blocks: there and back, and what is refused by name."""

import json
import pickle
import shutil
from argparse import Namespace

import pytest
import torch
from conversion_samples import assert_same_tensors, convert, hf_tensors
from torch.distributed.checkpoint.metadata import MetadataIndex

from hf.mixed_models import EXPERTS, MIXED, build_mixed
from megalodon_mcore.__main__ import main
from megalodon_mcore.config import config_from_arguments
from megalodon_mcore.conversion.hf_folder import open_hf
from megalodon_mcore.conversion.hf_model import hf_model
from megalodon_mcore.conversion.mcore_checkpoint import common_state, open_mcore
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader

LAYERS = {**MIXED, "XX": EXPERTS, "MXM": dict(num_experts=3)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of M*ME: the Hugging Face folder and Megatron's."""
    folder = tmp_path_factory.mktemp("mixed")
    build_mixed().save_pretrained(folder / "hf")
    assert convert("hf", "mcore", folder / "hf", folder / "mcore") == 0
    return folder / "hf", folder / "mcore"


def arguments_of(checkpoint, **changes):
    """The arguments that a checkpoint keeps, with changes."""
    found = common_state(TorchDistReader(checkpoint / "release"))["args"]
    return Namespace(**vars(found) | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("symbols", LAYERS)
def test_there_and_back(symbols, dtype, tmp_path):
    start = tmp_path / "start"
    model = build_mixed(symbols, **LAYERS[symbols]).to(dtype)
    model.save_pretrained(start)
    assert convert("hf", "mcore", start, tmp_path / "mcore") == 0
    assert convert("mcore", "mcore", tmp_path / "mcore", tmp_path / "again") == 0
    assert convert("mcore", "hf", tmp_path / "again", tmp_path / "hf") == 0
    assert_same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(start))
    assert open_hf(tmp_path / "hf").config == open_hf(start).config
    read = open_mcore(tmp_path / "mcore")
    assert read.config == open_hf(start).config
    tokens = torch.randint(64, (1, 30))
    with torch.no_grad():
        assert torch.equal(hf_model(read)(tokens).logits, model(tokens).logits)
    stacked = TorchDistReader(tmp_path / "mcore" / "release").shape(
        "decoder.layers.feed_forward.experts.experts.experts.linear_fc1.weight"
    )
    assert stacked == ((2, 5, 40, 32) if symbols == "XX" else None)


def test_layers_that_predict_further_tokens_are_left_out_and_named(checkpoints, tmp_path, capsys):
    _, mcore = checkpoints
    given = tmp_path / "given"
    assert convert("mcore", "mcore", mcore, given) == 0
    reader = TorchDistReader(given / "release")
    name, taken = "mtp.layers.0.enorm.weight", "decoder.final_layernorm.weight"
    reader.entries[name] = reader.entries[taken]
    zero = torch.Size([0])
    reader.places[MetadataIndex(name, zero)] = reader.places[MetadataIndex(taken, zero)]
    (given / "release" / ".metadata").write_bytes(pickle.dumps(reader.metadata))
    assert convert("mcore", "hf", given, tmp_path / "hf") == 0
    said = [z for z in capsys.readouterr().err.splitlines() if "multi-token prediction" in z]
    assert len(said) == 1 and said[0].endswith("they are left out.")
    assert_same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(checkpoints[0]))


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_formats_without_such_layers_refuse_them(checkpoints, tmp_path, capsys):
    hf, mcore = checkpoints
    words = "has layers M*ME, and the released format plain blocks (M) alone"
    for source, folder in (("hf", hf), ("mcore", mcore)):
        given = ("convert", "--from", source, "--to", "released", folder, tmp_path / "released")
        assert words in refused(capsys, *given)
    said = refused(capsys, "container", "--to", "gpt", mcore, tmp_path / "gpt")
    assert "has layers M*ME" in said


def test_what_no_arguments_of_megatron_say_is_refused(tmp_path, capsys):
    model = build_mixed("M*ME", layer_symbols="X*ME")
    model.save_pretrained(tmp_path / "both")
    given = ("convert", "--from", "hf", "--to", "mcore", tmp_path / "both", tmp_path / "mcore")
    assert "layers is X*ME, which has both E and X" in refused(capsys, *given)


REFUSED = {
    "--rotary-interleaved True": dict(rotary_interleaved=True),
    "--moe-router-num-groups 2": dict(moe_router_num_groups=2),
    "--moe-expert-capacity-factor 1.5": dict(moe_expert_capacity_factor=1.5),
    "--moe-router-load-balancing-type sinkhorn": dict(moe_router_load_balancing_type="sinkhorn"),
    "--moe-router-load-balancing-type quantile_balancing": dict(
        moe_router_load_balancing_type=["aux_loss", "quantile_balancing"]
    ),
    "--add-bias-linear True": dict(add_bias_linear=True),
    "without --swiglu": dict(swiglu=False),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_place_outside_megatron_is_refused_by_name(checkpoints, words):
    arguments = arguments_of(checkpoints[1], **REFUSED[words])
    with pytest.raises(ValueError, match="was trained with") as said:
        config_from_arguments(arguments, 64, "the checkpoint")
    assert words in str(said.value)


def test_a_folder_that_says_other_layers_is_refused(checkpoints, tmp_path, capsys):
    hf, _ = checkpoints
    for values, words in (
        ({"layer_symbols": "M**E"}, "knows nothing"),
        ({"layer_symbols": "MMME"}, "attention_heads is 4, but layer_symbols has none of *"),
        ({"layer_symbols": "M*M"}, "layer_symbols has 3 symbols and num_hidden_layers is 4"),
        ({"layer_symbols": 4}, "layer_symbols"),
        ({"num_experts": 4}, "shape"),
        ({"num_experts": "5"}, "num_experts is 5; it takes a positive integer"),
        ({"router_bias": False}, "knows nothing"),
    ):
        given = tmp_path / "given"
        shutil.rmtree(given, ignore_errors=True)
        shutil.copytree(hf, given)
        found = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps(found | values))
        arguments = ("convert", "--from", "hf", "--to", "mcore", given, tmp_path / "made")
        assert words in refused(capsys, *arguments), values
