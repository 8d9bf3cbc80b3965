"""vLLM on a card: what it answers beside the Hugging Face model on the CPU, and a step's time.

Steps of single tokens come from CUDA graphs, which hold them; without graphs the answers have to
be the same.
"""

import os
import random
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import models
from stage import Stage

# An engine in this process, which others beside it on the card do not disturb.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
MEMORY = 12 << 30
# The sums of float32 in another order, in logprobs of small models.
TOLERANCE = 1e-4


@contextmanager
def engine(stage, folder, **options):
    """An engine of a folder, its share of a card's memory the same whatever else is on it."""
    import served

    if not stage.rehearse:
        options |= {"kv_cache_memory_bytes": MEMORY, "gpu_memory_utilization": 0.2}
    with served.engine(folder, max_model_len=2048, **options) as llm:
        yield llm


def captured(llm):
    """How its CUDA graphs are, by name."""
    return llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name


def answers(stage, build, eager, **options):
    """Drawn requests, greedy, each as the Hugging Face model answers it."""
    import served

    generator = random.Random(0)
    prompts = [served.draw(generator, generator.randrange(1, 150)) for _ in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        model = build()
        served.export(Path(folder), model)
        with engine(stage, folder, enforce_eager=eager, **options) as llm:
            graphs = captured(llm)
            outputs = served.generate(llm, prompts, served.greedy(24))
    for prompt, output in zip(prompts, outputs, strict=True):
        served.check(model, prompt, output.outputs[0], TOLERANCE)
    wanted = "NONE" if eager or stage.rehearse else "FULL_DECODE_ONLY"
    experts = model.config.has("EX")
    good = graphs == ("NONE" if experts else wanted)
    return "pass" if good else "fail", {"graphs": graphs, "answers": len(prompts)}


def speed(stage, eager, requests):
    """A step of `requests` tokens of the 200m, by the time that more of them take."""
    import served

    sizes = models.SIZES if stage.rehearse else models.SIZES_200M
    tokens = (2, 6) if stage.rehearse else (32, 160)
    generator = random.Random(0)
    prompts = [served.draw(generator, 32 if stage.rehearse else 512) for _ in range(requests)]
    with tempfile.TemporaryDirectory() as folder:
        served.export(Path(folder), models.hugging_face(sizes).bfloat16())
        options = {"dtype": "bfloat16", "max_num_seqs": requests, "max_num_batched_tokens": 8192}
        with engine(stage, folder, enforce_eager=eager, **options) as llm:
            served.generate(llm, prompts, served.greedy(2))
            times = []
            for count in tokens:
                start = time.monotonic()
                served.generate(llm, prompts, served.greedy(count))
                times.append(time.monotonic() - start)
            graphs = captured(llm)
    if stage.rehearse:
        return "figure", {"graphs": graphs}
    step = (times[1] - times[0]) / (tokens[1] - tokens[0])
    found = {"step_ms": 1e3 * step, "tokens_per_s": requests / step, "graphs": graphs}
    return "figure", found | {"prompts_s": times[0] - tokens[0] * step}


def all_answers(stage):
    """A row of each kind of layers."""
    from served import SHAPE, VOCABULARY

    from hf.hf_models import random_model
    from hf.mixed_models import build_mixed

    attention = {"attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    attention |= {"vocab_size": VOCABULARY, "attention_positions": "rope"}
    triton = {} if stage.rehearse else {"attention_backend": "TRITON_ATTN"}

    def blocks():
        return random_model(**SHAPE)

    def hybrid():
        return build_mixed("M*-", **attention)

    def experts():
        return build_mixed("X*", num_experts=4, **attention)

    stage.attempt("blocks", lambda: answers(stage, blocks, False))
    stage.attempt("blocks, eager", lambda: answers(stage, blocks, True))
    stage.attempt("attention beside blocks", lambda: answers(stage, hybrid, False, **triton))
    stage.attempt("experts", lambda: answers(stage, experts, False, **triton))


def all_speeds(stage):
    """A row of each number of requests, with graphs and without."""
    for requests in (1, 64):
        for eager in (False, True):
            label = f"200m, {requests} requests{', eager' if eager else ''}"
            stage.attempt(label, lambda r=requests, e=eager: speed(stage, e, r), least=5)


def main(stage):
    if not find_spec("vllm"):
        stage.add("serving", "missing", problem="vLLM is not installed")
        return
    {"answers": all_answers, "speed": all_speeds}[stage.part](stage)


if __name__ == "__main__":
    main(Stage.from_arguments())
