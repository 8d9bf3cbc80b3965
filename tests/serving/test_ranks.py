"""Ranks that share heads, the values in a head, and experts' columns answer as one does."""

import random

import pytest
from served import CHUNK, SHAPE, VOCABULARY, check_answers, draw, export, needs_vllm

from hf.hf_models import random_model
from hf.mixed_models import EXPERTS, build_mixed

pytestmark = [pytest.mark.vllm, needs_vllm]
ATTENTION = dict(
    attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    attention_positions="rope",
    linear_bias=True,
    vocab_size=VOCABULARY,
)


@pytest.mark.parametrize(
    ("symbols", "ranks", "values"),
    [
        ("MM", 2, SHAPE),
        # More ranks than heads: two share the values of one.
        ("MM", 4, SHAPE),
        ("M*-", 2, ATTENTION),
        ("XE*", 2, ATTENTION | EXPERTS),
    ],
)
def test_tensor_parallel(symbols, ranks, values, tmp_path):
    model = random_model(**values) if symbols == "MM" else build_mixed(symbols, **values)
    export(tmp_path, model)
    generator = random.Random(0)
    prompts = [draw(generator, n) for n in (1, CHUNK, 5 * CHUNK + 3, 100, 200)]
    options = dict(tensor_parallel_size=ranks, distributed_executor_backend="mp")
    check_answers(model, tmp_path, prompts, 20, max_model_len=1024, **options)
