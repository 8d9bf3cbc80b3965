"""What tests of serving have in common: small exported models, engines, and what is right."""

import contextlib
import importlib.util
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf.hf_models import random_model
from training.reserved_port import reserved_port

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; bash tests/vllm.sh installs and tests it",
)

VOCABULARY, CHUNK = 128, 16
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    z_dim=32,
    chunk_size=CHUNK,
    cema_ndim=4,
    norm_num_groups=4,
    swiglu=True,
    rescale_nffn=True,
)


def export(folder: Path, model=None):
    """Writes a model (random, of SHAPE) as `convert --to hf` does, a token a character."""
    model = random_model(**SHAPE) if model is None else model
    model.save_pretrained(folder)
    characters = Tokenizer(models.WordLevel({chr(n): n for n in range(VOCABULARY)}, chr(0)))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(folder)
    return model


@contextlib.contextmanager
def engine(folder, **options):
    """An engine of a folder's model in this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = dict(
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=64,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def greedy(max_tokens, **options):
    from vllm import SamplingParams

    options = dict(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0) | options
    return SamplingParams(**options)


def draw(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(1, VOCABULARY) for _ in range(length)]


def generate(llm, prompts, parameters):
    """The RequestOutput of each prompt of token numbers, in their order."""
    return llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)


@torch.no_grad()
def check(model, prompt, completion, tolerance=1e-5):
    """Asserts that a completion is the Hugging Face model's greedy one, with its logprobs."""
    tokens = list(completion.token_ids)
    row = torch.tensor([prompt + tokens[:-1]])
    scores = model(row, use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
    assert tokens == scores.argmax(-1).tolist()
    given = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    wanted = scores.amax(-1)
    torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=tolerance)


def check_answers(model, folder, prompts, max_tokens, **options):
    """Asserts that an engine answers every prompt as `check` wants."""
    with engine(folder, **options) as llm:
        outputs = generate(llm, prompts, greedy(max_tokens))
    for prompt, output in zip(prompts, outputs, strict=True):
        check(model, prompt, output.outputs[0])


@torch.no_grad()
def check_bfloat16(model, folder, prompts, **options):
    """Asserts that logprobs are as near to a float32 model's as those of one cast to bfloat16."""
    with engine(folder, dtype="bfloat16", **options) as llm:
        outputs = generate(llm, prompts, greedy(20))
    narrow, own, peer = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval(), [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        row, at = torch.tensor([prompt + tokens[:-1]]), torch.tensor(tokens)[:, None]
        exact, rounded = (
            z(row, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            for z in (model, narrow)
        )
        given = [z[t].logprob for z, t in zip(completion.logprobs, tokens, strict=True)]
        own.append((torch.tensor(given)[:, None] - exact.gather(1, at)).abs())
        peer.append((rounded - exact).gather(1, at).abs())
    own, peer = torch.cat(own).mean(), torch.cat(peer).mean()
    assert own < 1.2 * peer, (own, peer)


@contextlib.contextmanager
def server(folder, *options):
    """The address and the process of `vllm serve FOLDER`, once it answers."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with reserved_port() as port:
        address = f"http://127.0.0.1:{port}"
        command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        # As a user's: with the engine in a process of its own.
        process = subprocess.Popen(command, env=environment)
        try:
            wait_until_it_answers(process, address)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_it_answers(process, address, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "vllm serve ended"
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{address}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise TimeoutError(f"vllm serve does not answer after {seconds} s.")
