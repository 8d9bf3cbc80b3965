"""What is not served is refused in a sentence, before a model is built."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import SHAPE, engine, export, needs_vllm

from hf.hf_models import random_model
from hf.mixed_models import ATTENTION, build_mixed

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export(folder)
    return folder


def settle(folder, **options):
    """What vLLM does with a server's options before anything else."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(folder), **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(tensor_parallel_size=3), "--tensor-parallel-size is 3; ranks share value_dim"),
        (dict(enable_expert_parallel=True), "--enable-expert-parallel is set, but"),
        (dict(enable_prefix_caching=True), "--enable-prefix-caching is set, but"),
        (
            dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}),
            "--speculative-config is set, but",
        ),
        (dict(enable_lora=True), "--enable-lora is set; merge"),
        (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype is fp8"),
        (dict(mamba_cache_dtype="float16"), "--mamba-cache-dtype is float16"),
        (dict(pipeline_parallel_size=2), "--pipeline-parallel-size is 2; a Megalodon"),
        (dict(runner="pooling"), "--runner is pooling"),
    ],
)
def test_options(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        settle(folder, **options)


def test_models_without_a_block(tmp_path):
    export(tmp_path, build_mixed("*-", **ATTENTION))
    with pytest.raises(ValueError, match="it takes a block"):
        settle(tmp_path)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            SHAPE | dict(num_attention_heads=3, z_dim=48, value_dim=96),
            "num_attention_heads or values in a head, so it takes a divisor or a multiple of 3",
        ),
        (SHAPE | dict(intermediate_size=97), "intermediate_size, so it takes a divisor of 97"),
    ],
)
def test_ranks_that_do_not_divide_it(values, what, tmp_path):
    export(tmp_path, random_model(**values))
    with pytest.raises(ValueError, match=f"is 2; ranks share {what}"):
        settle(tmp_path, tensor_parallel_size=2)


def test_ranks_that_do_not_divide_the_experts(tmp_path):
    export(tmp_path, build_mixed("MX", num_experts=4, moe_intermediate_size=21))
    with pytest.raises(ValueError, match="ranks share moe_intermediate_size"):
        settle(tmp_path, tensor_parallel_size=2)


def test_lengths_are_bounded_by_options_alone(folder):
    assert settle(folder).model_config.max_model_len == 2**20
    assert settle(folder, max_model_len=2**24).model_config.max_model_len == 2**24


def test_no_code_of_a_folder_is_run(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "configuration_megalodon.py").write_text("raise SystemExit('run')")
    assert settle(tmp_path, skip_tokenizer_init=True).model_config.hf_config.chunk_size == 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda z: z.pop("model.layers.1.cema.theta"), "weights lack model.layers.1.cema.theta"),
        (lambda z: z.update(other=torch.ones(1)), "weights have other and the model has no such"),
        (lambda z: z.update({"model.norm.bias": torch.ones(65)}), "have model.norm.bias of shape"),
    ],
)
def test_weights(tmp_path, change, sentence):
    export(tmp_path, random_model(**SHAPE))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=sentence), engine(tmp_path):
        pass
