"""A prompt far longer than any Transformer's takes no more memory than a short one."""

import contextlib
import random
import threading

import psutil
import pytest
import torch
from served import draw, engine, export, generate, greedy, needs_vllm

pytestmark = [pytest.mark.vllm, needs_vllm]
LENGTHS = (1_000, 10_000, 200_000, 1_000_000)
TEXT = 80
"""Bytes that vLLM and this process may keep of a token: its number, in several lists."""
PIECE = 2**16


@contextlib.contextmanager
def peak():
    """A list that gets this process's most resident bytes while the context lasts."""
    process, stop, found = psutil.Process(), threading.Event(), []

    def look():
        most = 0
        while not stop.wait(0.02):
            most = max(most, process.memory_info().rss)
        found.append(most)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_memory_is_flat_from_1k_to_a_million_tokens(tmp_path):
    model = export(tmp_path)
    prompts = [draw(random.Random(n), n) for n in LENGTHS]
    with engine(tmp_path, max_num_seqs=4, max_num_batched_tokens=2048) as llm:
        # All there is to set up is set up.
        generate(llm, [draw(random.Random(0), 100_000)], greedy(5))
        sizes, completions = [], []
        for prompt in prompts:
            with peak() as found:
                [output] = generate(llm, [prompt], greedy(5))
            completions.append(output.outputs[0])
            sizes += found
    assert max(sizes[:-1]) < 1.02 * min(sizes), sizes
    assert sizes[-1] < sizes[0] + TEXT * LENGTHS[-1], sizes
    with torch.no_grad():
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = list(completion.token_ids)
            cache = None
            for piece in torch.tensor(prompt).split(PIECE):
                read = model(piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = read.past_key_values
            logits = [read.logits[0, -1]]
            for token in tokens[:-1]:
                step = model(torch.tensor([[token]]), past_key_values=cache)
                logits.append(step.logits[0, -1])
            scores = torch.stack(logits).log_softmax(-1)
            assert tokens == scores.argmax(-1).tolist()
            given = [z[t].logprob for z, t in zip(completion.logprobs, tokens, strict=True)]
            torch.testing.assert_close(torch.tensor(given), scores.amax(-1), rtol=0, atol=1e-5)
