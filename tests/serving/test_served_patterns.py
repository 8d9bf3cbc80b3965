"""Models with attention, MLPs and experts beside or in their blocks."""

import random

import pytest
from served import (
    VOCABULARY,
    check,
    check_answers,
    check_bfloat16,
    draw,
    engine,
    export,
    generate,
    greedy,
    needs_vllm,
)

from hf.mixed_models import EXPERTS, build_mixed

pytestmark = [pytest.mark.vllm, needs_vllm]

ATTENTION = dict(attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=VOCABULARY)
ROPE = ATTENTION | dict(attention_positions="rope", partial_rotary_factor=0.5)
MODELS = {
    "M*ME": ROPE | EXPERTS,
    "*M-": ROPE | dict(linear_bias=True, normalization="RMSNorm"),
    "MX*": ATTENTION | dict(num_experts=4, rescale_nffn=True),
    "M-": dict(vocab_size=VOCABULARY),
}


@pytest.mark.parametrize("symbols", MODELS)
def test_drawn_requests(symbols, tmp_path):
    model = build_mixed(symbols, **MODELS[symbols])
    export(tmp_path, model)
    generator = random.Random(0)
    prompts = [draw(generator, generator.randrange(1, 300)) for _ in range(30)]
    check_answers(model, tmp_path, prompts, 12, max_model_len=1024)


def test_bfloat16(tmp_path):
    model = build_mixed("*M-E", **ROPE, **EXPERTS, linear_bias=True)
    export(tmp_path, model)
    generator = random.Random(2)
    prompts = [draw(generator, generator.randrange(1, 200)) for _ in range(20)]
    check_bfloat16(model, tmp_path, prompts, max_model_len=1024)


def test_requests_preempted_by_a_small_pool(tmp_path):
    from vllm.v1.core.sched.scheduler import Scheduler

    model = build_mixed("M*", **ROPE)
    export(tmp_path, model)
    generator = random.Random(1)
    prompts = [draw(generator, generator.randrange(110, 128)) for _ in range(8)]
    # A block of 128 tokens each, and of states, at first; then one more of tokens.
    with engine(tmp_path, max_model_len=512, num_gpu_blocks_override=17) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == 128
        preempted = []
        with pytest.MonkeyPatch.context() as patch:
            preempt = Scheduler._preempt_request

            def counted(self, request, *args, **options):
                preempted.append(request.request_id)
                return preempt(self, request, *args, **options)

            patch.setattr(Scheduler, "_preempt_request", counted)
            outputs = generate(llm, prompts, greedy(40))
        assert preempted
        for prompt, output in zip(prompts, outputs, strict=True):
            check(model, prompt, output.outputs[0])
