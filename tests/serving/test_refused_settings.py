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
        (dict(mamba_ssm_cache_dtype="float32"), "--mamba-ssm-cache-dtype is float32"),
        (dict(mamba_block_size=64), "--mamba-block-size is 64"),
        (dict(block_size=64), "--block-size is 64"),
        (dict(kv_offloading_size=1), "--kv-transfer-config or --kv-offloading-size is set"),
        (dict(cpu_offload_gb=1), "--cpu-offload-gb or --offload-group-size is set"),
        (
            dict(tensor_parallel_size=2, decode_context_parallel_size=2),
            "--decode-context-parallel-size or --prefill-context-parallel-size is set",
        ),
        (dict(ubatch_size=2), "--enable-dbo or --ubatch-size is set"),
    ],
)
def test_options(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        settle(folder, **options)


@pytest.mark.parametrize(
    ("symbols", "options", "mode"),
    [
        ("MM", {}, "FULL_DECODE_ONLY"),
        ("MM", {"optimization_level": 0}, "NONE"),
        ("MM", {"enforce_eager": True}, "NONE"),
        ("MM", {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "NONE"),
        (
            "MM",
            {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
            "FULL_DECODE_ONLY",
        ),
        ("MX", {}, "NONE"),
    ],
)
def test_graphs_hold_steps_of_single_tokens(symbols, options, mode, tmp_path, monkeypatch):
    from megalodon_mcore.serving import limits

    model = random_model(**SHAPE) if symbols == "MM" else build_mixed(symbols, num_experts=4)
    export(tmp_path, model)
    found, graphs = [], limits._graphs
    # A CPU has none in the end.
    monkeypatch.setattr(limits, "_graphs", lambda z: found.append(graphs(z)) or found[-1])
    settle(tmp_path, **options)
    assert found[-1].name == mode


def test_graphs_leave_a_page_each(folder):
    from megalodon_mcore.serving.limits import _leave_a_page_each

    settings = settle(folder, max_num_seqs=100, gpu_memory_utilization=0.5, dtype="bfloat16")
    # What VLLM_CPU_KVCACHE_SPACE sets.
    settings.cache_config.kv_cache_memory_bytes = None
    (weights,) = folder.glob("*.safetensors")
    # Of SHAPE: mean and var, averages, keys and values, of each of two blocks.
    request = 2 * (4 * 4 * 8 + 64 * 4 * 2 * 4 + 16 * (32 + 128) * 2)
    for memory, most in ((10**9, 100), (int(2 * (request * 11 + weights.stat().st_size)), 8)):
        _leave_a_page_each(settings, memory)
        assert settings.scheduler_config.max_num_seqs == most


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
