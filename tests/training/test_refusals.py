"""What Megalodon cannot do fails before training, with one sentence that names the argument."""

import pytest

from building import transformer_config
from megalodon_mcore.validation import check_supported
from training.runs import TINY, launch

REFUSED = {
    "tensor_model_parallel_size": (2, "--tensor-model-parallel-size is 2"),
    "context_parallel_size": (2, "--context-parallel-size is 2"),
    "sequence_parallel": (True, "--sequence-parallel is set"),
    "num_moe_experts": (4, "--num-experts is set"),
    "mtp_num_layers": (1, "--mtp-num-layers is set"),
    "multi_latent_attention": (True, "--multi-latent-attention is set"),
    "fp8": ("hybrid", "--fp8-format is set"),
    "use_mup": (True, "--use-mup is set"),
    "qk_layernorm": (True, "--qk-layernorm is set"),
    "cuda_graph_impl": ("local", "--cuda-graph-impl is set"),
    "num_query_groups": (1, "--num-query-groups is 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_option_is_refused_by_name(name):
    config = transformer_config(heads=2)
    check_supported(config, "none")
    value, sentence = REFUSED[name]
    setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        check_supported(config, "none")


def test_added_positions_are_refused():
    with pytest.raises(ValueError, match="--position-embedding-type is learned_absolute"):
        check_supported(transformer_config(), "learned_absolute")


def test_unknown_recompute_module_is_refused():
    config = transformer_config(recompute_granularity="selective", recompute_modules=["layernorm"])
    with pytest.raises(ValueError, match="--recompute-modules has layernorm"):
        check_supported(config, "none")


def test_pretrain_exits_with_the_sentence_and_no_traceback():
    result = launch("-m", "megalodon_mcore", "pretrain", *TINY, "--megalodon-z-dim", "7")
    assert result.returncode == 1
    assert "z_dim is 7, which --num-attention-heads 2 does not divide" in result.stdout
    assert "Traceback" not in result.stdout
