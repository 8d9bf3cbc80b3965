"""An engine's answers are the Hugging Face model's, whatever else it computes at the time."""

import random

import pytest
import torch
from served import CHUNK, check, draw, engine, export, generate, greedy, needs_vllm

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model and an engine of it."""
    folder = tmp_path_factory.mktemp("model")
    model = export(folder)
    with engine(folder) as llm:
        yield model, llm


def test_drawn_requests_in_any_order(served):
    model, llm = served
    generator = random.Random(0)
    prompts = [draw(generator, generator.randrange(1, 8 * CHUNK)) for _ in range(200)]
    asked = [greedy(generator.randrange(1, 25)) for _ in prompts]
    drawn = list(range(len(prompts)))
    shuffled = generator.sample(drawn, len(drawn))
    by_length = sorted(drawn, key=lambda n: len(prompts[n]))
    answers = {}
    for order in (shuffled, by_length, by_length[::-1]):
        outputs = generate(llm, [prompts[n] for n in order], [asked[n] for n in order])
        for n, output in zip(order, outputs, strict=True):
            completion = output.outputs[0]
            assert len(completion.token_ids) == asked[n].max_tokens
            if order is shuffled:
                check(model, prompts[n], completion)
                answers[n] = completion.token_ids
            else:
                assert completion.token_ids == answers[n]


def test_prompts_that_end_at_chunk_bounds(served):
    model, llm = served
    lengths = [n + more for n in (CHUNK, 2 * CHUNK, 5 * CHUNK) for more in (-1, 0, 1)]
    prompts = [draw(random.Random(n), n) for n in (1, 2, *lengths)]
    for prompt in prompts:
        # Alone, so that nothing else moves it in the batch.
        [output] = generate(llm, [prompt], greedy(2 * CHUNK + 1))
        check(model, prompt, output.outputs[0])


def test_logprobs_of_prompts(served):
    model, llm = served
    prompt = draw(random.Random(5), 4 * CHUNK + 3)
    [output] = generate(llm, [prompt], greedy(1, prompt_logprobs=0))
    given = [z[t].logprob for z, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    with torch.no_grad():
        scores = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].log_softmax(-1)
    wanted = scores.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=1e-5)


def test_requests_of_one_prefix(served):
    model, llm = served
    generator = random.Random(1)
    prefix = draw(generator, 3 * CHUNK + 5)
    prompts = [prefix + draw(generator, n) for n in (0, 1, 1, 7, CHUNK, 40)] + [prefix]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(10)), strict=True):
        check(model, prompt, output.outputs[0])


def test_several_completions_of_a_prompt(served):
    model, llm = served
    prompt = draw(random.Random(2), 21)
    [output] = generate(llm, [prompt], greedy(12, temperature=1.0, n=3, seed=5))
    alone = [greedy(12, temperature=1.0, seed=5 + n) for n in range(3)]
    expected = [z.outputs[0].token_ids for z in generate(llm, [prompt] * 3, alone)]
    assert [z.token_ids for z in output.outputs] == expected
    assert len({tuple(z) for z in expected}) == 3


def test_stop_strings(served):
    model, llm = served
    prompt = draw(random.Random(3), 30)
    [whole] = generate(llm, [prompt], greedy(40))
    text = whole.outputs[0].text
    assert len(text) == 40
    stop = text[17:20]
    [stopped] = generate(llm, [prompt], greedy(40, stop=[stop]))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)


def test_preempted_requests_start_again(served):
    model, llm = served
    generator = random.Random(4)
    prompts = {str(n): draw(generator, generator.randrange(1, 6 * CHUNK)) for n in range(12)}
    asked, done, steps, preempted = greedy(30), {}, 0, 0
    core = llm.llm_engine
    for name, prompt in prompts.items():
        core.add_request(name, {"prompt_token_ids": prompt}, asked)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[output.request_id.partition("-")[0]] = output.outputs[0]
        steps += 1
        if steps in (3, 9, 20):
            # All of them lose their pages, those in the middle of a prompt too.
            preempted += len(core.engine_core.engine_core.scheduler.running)
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert preempted > 12
    for name, prompt in prompts.items():
        check(model, prompt, done[name])
