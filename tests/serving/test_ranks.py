"""Two ranks that share heads and columns answer as one does."""

import random

import pytest
from served import CHUNK, SHAPE, VOCABULARY, check_answers, draw, export, needs_vllm

from hf.hf_models import random_model
from hf.mixed_models import build_mixed

pytestmark = [pytest.mark.vllm, needs_vllm]
ATTENTION = dict(
    attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    attention_positions="rope",
    linear_bias=True,
    vocab_size=VOCABULARY,
)


@pytest.mark.parametrize("symbols", ["MM", "M*-"])
def test_tensor_parallel(symbols, tmp_path):
    mixed = symbols != "MM"
    model = build_mixed(symbols, **ATTENTION) if mixed else random_model(**SHAPE)
    export(tmp_path, model)
    generator = random.Random(0)
    prompts = [draw(generator, n) for n in (1, CHUNK, 5 * CHUNK + 3, 100, 200)]
    ranks = dict(tensor_parallel_size=2, distributed_executor_backend="mp", max_model_len=1024)
    check_answers(model, tmp_path, prompts, 20, **ranks)
