"""`vllm serve FOLDER` as clients see it: OpenAI's, over HTTP."""

import asyncio
import random
import urllib.error
import urllib.request

import pytest
import torch
from served import CHUNK, VOCABULARY, draw, export, needs_vllm, server

openai = pytest.importorskip("openai", reason="openai comes with vLLM; see tests/vllm.sh")
pytestmark = [pytest.mark.vllm, needs_vllm]
LIMIT = 2_000


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model, a client of a server of it, its address and its process."""
    folder = tmp_path_factory.mktemp("model")
    model = export(folder)
    sizes = ["--max-model-len", str(LIMIT), "--max-num-seqs", "8", "--max-num-batched-tokens"]
    with server(folder, *sizes, "128", "--served-model-name", "tiny") as (address, process):
        yield model, openai.OpenAI(base_url=f"{address}/v1", api_key="none"), address, process


def ask(client, prompt, max_tokens=10, **options):
    options = dict(temperature=0, logprobs=0, extra_body={"ignore_eos": True}) | options
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, **options)


def check_text(model, prompt, choice):
    """Asserts that a choice of the API is the Hugging Face model's greedy answer."""
    tokens = [ord(z) for z in choice.text]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits
    scores = logits[0, len(prompt) - 1 :].log_softmax(-1)
    assert tokens == scores.argmax(-1).tolist()
    given = torch.tensor(choice.logprobs.token_logprobs)
    torch.testing.assert_close(given, scores.amax(-1), rtol=0, atol=1e-5)


def test_completions(served):
    model, client, *_ = served
    prompts = [draw(random.Random(n), n) for n in (1, CHUNK, 100, LIMIT - 20)]
    answer = ask(client, prompts, 20)
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        check_text(model, prompts[choice.index], choice)
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_text_and_stop_strings(served):
    model, client, *_ = served
    text = "the quick brown fox"
    whole = ask(client, text, 30).choices[0]
    check_text(model, [ord(z) for z in text], whole)
    [stopped] = ask(client, text, 30, stop=[whole.text[11:13]]).choices
    assert stopped.text == whole.text[: whole.text.index(whole.text[11:13])]
    assert stopped.finish_reason == "stop"


def test_streams(served):
    _, client, *_ = served
    prompt = draw(random.Random(5), 50)
    whole = ask(client, prompt, 25).choices[0].text
    pieces = [z.choices[0].text for z in ask(client, prompt, 25, stream=True)]
    assert len(pieces) > 10
    assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        ([1] * (LIMIT + 1), {}, openai.BadRequestError, str(LIMIT)),
        ([1] * LIMIT, {}, openai.BadRequestError, "at least 1, got 0"),
        ([VOCABULARY], {}, openai.BadRequestError, "vocab"),
        ([-1], {}, openai.BadRequestError, ""),
        ([1], dict(temperature=-1), openai.BadRequestError, "temperature"),
        ([1], dict(n=0), openai.BadRequestError, "n"),
        ("", {}, openai.BadRequestError, ""),
    ],
)
def test_requests_that_do_not_fit(served, prompt, options, error, says):
    model, client, *_ = served
    with pytest.raises(error, match=says or None):
        ask(client, prompt, **options)
    good = draw(random.Random(6), 20)
    check_text(model, good, ask(client, good).choices[0])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "tiny", "prompt": {"a": 1}}'])
def test_bodies_that_are_no_request(served, body):
    model, client, address, _ = served
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", body, headers)
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=60)
    assert raised.value.code in (400, 422)
    good = draw(random.Random(7), 20)
    check_text(model, good, ask(client, good).choices[0])


def test_load(served):
    from load import load

    _, _, address, process = served
    folder = process.args[2]
    counts = asyncio.run(load(address, folder, 200, process.pid))
    assert counts["answered"] == 2 * 190
    assert counts["disconnected"] == 2 * 10
    assert counts["refused"] == 2 * 40
    assert process.poll() is None
