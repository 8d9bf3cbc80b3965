"""Loads a running server, checks every answer, and looks whether the server comes to rest.

    python examples/serve/load.py FOLDER --url http://127.0.0.1:8000 [--pid N]

FOLDER is what the server serves, in --dtype float32: each greedy answer has to be the Hugging Face
model's. Some clients disconnect in the middle of their answers, and between the requests are
malformed and oversized ones, which have to be refused. Of a server on this machine --pid tells
whose memory has to be back where it was after a first such round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from typing import Any

import aiohttp
import psutil
import torch

MALFORMED = (b"{", b"[]", b'{"prompt": {"a": 1}}', b'{"prompt": [1], "max_tokens": -1}')
GROWTH = 1.05


class Load:
    """A server's load of requests, and what came of each."""

    def __init__(self, url: str, name: str, limit: int, vocabulary: int) -> None:
        self.url, self.name, self.limit, self.vocabulary = url, name, limit, vocabulary
        self.answers: list[tuple[list[int], list[int]]] = []
        self.counts = {"answered": 0, "disconnected": 0, "refused": 0}

    async def run(self, count: int, seed: int) -> None:
        """Sends so many requests at once, a twentieth of which end early, and bad ones between.

        Raises:
            RuntimeError: one is not answered as it should be.
        """
        draw = random.Random(seed)
        timeout = aiohttp.ClientTimeout(total=3600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = []
            for n in range(count):
                prompt = [draw.randrange(1, self.vocabulary) for _ in range(draw.randrange(1, 200))]
                tokens = draw.randrange(2, 40)
                if n % 20 == 7:
                    tasks.append(self.disconnect(session, prompt))
                else:
                    tasks.append(self.ask(session, prompt, tokens))
                if n % 10 == 3:
                    tasks.append(self.refused(session, MALFORMED[n // 10 % len(MALFORMED)]))
                if n % 10 == 8:
                    oversized = self.body([1] * (self.limit + 1), 5)
                    tasks.append(self.refused(session, json.dumps(oversized).encode()))
            await asyncio.gather(*tasks)

    def body(self, prompt: list[int], tokens: int, **options: object) -> dict[str, object]:
        """A request for greedy tokens."""
        asked = {"model": self.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return asked | {"ignore_eos": True, "return_token_ids": True} | options

    async def ask(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> None:
        """One whole answer, kept to be checked."""
        url = f"{self.url}/v1/completions"
        async with session.post(url, json=self.body(prompt, tokens)) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {await response.text()}")
            choice = (await response.json())["choices"][0]
        if len(choice["token_ids"]) != tokens:
            raise RuntimeError(f"{tokens} tokens were asked for; {len(choice['token_ids'])} came.")
        self.answers.append((prompt, choice["token_ids"]))
        self.counts["answered"] += 1

    async def disconnect(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        """Leaves after the first piece of an answer that would take long."""
        body = self.body(prompt, self.limit - len(prompt) - 1, stream=True)
        async with session.post(f"{self.url}/v1/completions", json=body) as response:
            await response.content.readany()
            response.close()
        self.counts["disconnected"] += 1

    async def refused(self, session: aiohttp.ClientSession, body: bytes) -> None:
        """What is no request, or too long a one."""
        headers = {"Content-Type": "application/json"}
        async with session.post(
            f"{self.url}/v1/completions", data=body, headers=headers
        ) as response:
            if response.status not in (400, 422):
                raise RuntimeError(f"{body[:60]!r} got {response.status} and not a refusal.")
        self.counts["refused"] += 1

    async def rest(self, seconds: float = 120) -> None:
        """Waits until nothing runs or waits and no page is held.

        Raises:
            RuntimeError: something still does.
        """
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        async with aiohttp.ClientSession() as session:
            for _ in range(int(seconds)):
                async with session.get(f"{self.url}/metrics") as response:
                    text = await response.text()
                found = {
                    name: [float(z) for z in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M)]
                    for name in names
                }
                if all(found.values()) and not any(map(any, found.values())):
                    return
                await asyncio.sleep(1)
        raise RuntimeError(f"The server does not come to rest: {found}.")


@torch.no_grad()
def check(folder: str, answers: list[tuple[list[int], list[int]]]) -> None:
    """Compares answers with the Hugging Face model's greedy ones.

    Raises:
        RuntimeError: one differs.
    """
    from megalodon_mcore.hf import MegalodonForCausalLM

    model = MegalodonForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, tokens in answers:
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0]
        wanted = logits[len(prompt) - 1 :].argmax(-1).tolist()
        if tokens != wanted:
            raise RuntimeError(f"A prompt of {len(prompt)} tokens got {tokens}, not {wanted}.")


def memory(pid: int) -> int:
    """Bytes of a process and its children that no other process shares."""
    process = psutil.Process(pid)
    family = (process, *process.children(recursive=True))
    return sum(z.memory_full_info().uss for z in family)


async def load(url: str, folder: str, count: int, pid: int | None) -> dict[str, Any]:
    """Two rounds of `count` requests, of which all that is known is returned.

    Raises:
        RuntimeError: an answer is wrong or missing, or the server does not come to rest.
    """
    from megalodon_mcore.hf import MegalodonConfig

    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/models") as response:
            served = (await response.json())["data"][0]
    vocabulary = MegalodonConfig.from_pretrained(folder).vocab_size
    own = Load(url, served["id"], served["max_model_len"], vocabulary)
    sizes = []
    for seed in range(2):
        await own.run(count, seed)
        await own.rest()
        if pid is not None:
            sizes.append(memory(pid))
    check(folder, own.answers)
    if sizes and sizes[1] > GROWTH * sizes[0]:
        raise RuntimeError(f"The server held {sizes[0]} bytes, and after another round {sizes[1]}.")
    return own.counts | {"MiB after each round": [z >> 20 for z in sizes]}


def main() -> None:
    """Reads the arguments, and prints what came of the requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=200, help="at once, in each of two rounds")
    parser.add_argument("--pid", type=int, help="of vllm serve, whose memory is to be looked at")
    args = parser.parse_args()
    try:
        print(json.dumps(asyncio.run(load(args.url, args.folder, args.requests, args.pid))))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
