"""Weights that are loaded anew while the server runs, as by training that goes on."""

import random

import pytest
import torch
from served import SHAPE, VOCABULARY, check, draw, engine, export, generate, greedy, needs_vllm

from hf.hf_models import random_model
from hf.mixed_models import EXPERTS, build_mixed

pytestmark = [pytest.mark.vllm, needs_vllm]


def models(symbols):
    """Two of one shape."""
    for change in (1, 1.25):
        values = EXPERTS | {"vocab_size": VOCABULARY}
        model = random_model(**SHAPE) if symbols == "MM" else build_mixed(symbols, **values)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(change)
        yield model


@pytest.mark.parametrize("symbols", ["MM", "XE"])
def test_answers_are_the_new_weights(symbols, tmp_path):
    first, second = models(symbols)
    export(tmp_path, first)
    generator = random.Random(0)
    prompts = [draw(generator, n) for n in (1, 30, 200)]
    with engine(tmp_path, max_model_len=512) as llm:
        for model in (first, second):
            if model is second:
                export(tmp_path, second)
                llm.collective_rpc("reload_weights")
            outputs = generate(llm, prompts, greedy(12))
            for prompt, output in zip(prompts, outputs, strict=True):
                check(model, prompt, output.outputs[0])


def test_layers_that_a_batch_leaves_out_run_as_nobody(tmp_path):
    from vllm.forward_context import get_forward_context

    from megalodon_mcore.serving.model import MegalodonForCausalLM

    export(tmp_path)
    forward, seen = MegalodonForCausalLM.forward, []

    def run(self, *args, **others):
        context = get_forward_context()
        kept, context.attn_metadata = context.attn_metadata, {}
        try:
            seen.append(forward(self, *args, **others))
        finally:
            context.attn_metadata = kept
        return forward(self, *args, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MegalodonForCausalLM, "forward", run)
        with engine(tmp_path, max_model_len=512) as llm:
            generate(llm, [draw(random.Random(0), 30)], greedy(2))
    assert len(seen) > 1
