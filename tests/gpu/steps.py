"""Stage 5: whole training steps beside Megatron's GPT, decoding after short and long prompts."""

import gc
from functools import partial
from importlib.util import find_spec

import torch

import models
from clock import ceilings, seconds
from stage import Stage

SIZES_1_3B = {"layers": 4, "hidden_size": 2048, "heads": 2, "z_dim": 512, "value_dim": 4096}
SIZES_1_3B |= {"ffn": 4864, "chunk": 2048, "groups": 64, "vocabulary": 256}
SHORTEST = 4096
TINY = {"layers": 2, "hidden_size": 64, "heads": 2, "z_dim": 32, "value_dim": 64}
TINY |= {"ffn": 96, "chunk": 16, "groups": 4, "vocabulary": 64}


def problems(rehearse):
    """(label, sizes, tokens of a step, lengths); a stack has a vocabulary of bytes."""
    if rehearse:
        return [("tiny", TINY, 64, (32, 64))]
    return [
        ("200m", models.SIZES_200M, 32768, (SHORTEST, 32768, 65536)),
        ("4 layers of 1.3b", SIZES_1_3B, 32768, (SHORTEST, 32768, 65536)),
    ]


def step(stage, build, sizes, batch, length, best):
    """Tokens/s, share of the peak and memory of a step."""
    gc.collect()
    model = build()
    parameters = sum(z.numel() for z in model.parameters())
    if not stage.rehearse:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = model.cuda()
    run = models.training_step(model, batch, length, masked=False)
    time = seconds(stage, run, spent=2)
    found = {"parameters": parameters, "batch": batch}
    if not stage.rehearse:
        found |= {"tokens_per_s": batch * length / time, "ms": 1e3 * time}
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if sizes:
            found["peak_share"] = models.matrix_flops(batch, length, sizes) / time / best.flops
    return "figure", found


def decode(stage, prompt, best):
    """A token of the Hugging Face model after a prompt, beside reading its weights once."""
    sizes = TINY if stage.rehearse else models.SIZES_200M
    with torch.device(stage.device):
        model = models.hugging_face(sizes).to(torch.bfloat16)
        tokens = torch.randint(sizes["vocabulary"], (1, prompt))
    with torch.inference_mode():
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        step = partial(model, tokens[:, -1:], past_key_values=cache)
        time = seconds(stage, step)
        if stage.rehearse:
            return "figure", {}
        # The cache's tensors stay where they are, so a step is one graph.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found = {"ms": 1e3 * seconds(stage, graph.replay), "eager_ms": 1e3 * time}
    size = sum(z.numel() * z.element_size() for z in model.parameters())
    return "figure", found | {"weights_ms": 1e3 * size / best.bandwidth}


def fitting(function):
    """What does not fit in the card's memory is no fault."""

    def run():
        try:
            return function()
        except torch.OutOfMemoryError as error:
            return "missing", {"problem": f"out of memory: {error}"[:200]}

    return run


def main(stage):
    best = ceilings(stage)
    if find_spec("megatron"):
        train(stage, best)
    else:
        stage.add("steps", "missing", problem="no megatron-core; --wheels names a folder with one")
    if not find_spec("transformers"):
        stage.add("decode", "missing", problem="transformers is not installed")
        return
    for prompt in (24, 40) if stage.rehearse else (1024, 131072):
        stage.attempt(
            f"decode a token after {prompt}",
            fitting(lambda prompt=prompt: decode(stage, prompt, best)),
            least=5,
        )


def train(stage, best):
    """Rows of training steps, and how flat the speed is from length to length."""
    with models.megatron():
        for label, sizes, tokens, lengths in problems(stage.rehearse):
            speeds = [
                compare(stage, label, sizes, max(1, tokens // length), length, best)
                for length in lengths
            ]
            if all(speeds):
                stage.add(
                    f"{label}: flatness", "figure", longest_over_shortest=speeds[-1] / speeds[0]
                )


def compare(stage, label, sizes, batch, length, best):
    """A row of Megalodon's step and one of the GPT's; the first's tokens/s, where it has any.

    With Transformer Engine, at the first length, in its layers and in FP8 too.
    """
    speed = None

    def pair(way, **options):
        """What builds each, and whether its flops are counted."""
        return {
            f"Megalodon{way}": (partial(models.megalodon, torch.bfloat16, sizes, **options), sizes),
            f"Megatron's GPT{way}": (
                partial(models.gpt, torch.bfloat16, length, sizes, fused=True, **options),
                None,
            ),
        }

    ways = pair("")
    if find_spec("transformer_engine") and length == SHORTEST and not stage.rehearse:
        for recipe in (None, "tensorwise"):
            name = f"FP8 {recipe}" if recipe else "bfloat16"
            ways |= pair(f", Transformer Engine, {name}", **models.engine(recipe))
    for way, (build, counted) in ways.items():

        def measure(build=build, counted=counted):
            nonlocal speed
            verdict, found = step(stage, build, counted, batch, length, best)
            speed = speed or (found.get("tokens_per_s") if counted else None)
            return verdict, found

        stage.attempt(f"{label}, L {length}: {way}", fitting(measure), least=5)
    return speed


if __name__ == "__main__":
    main(Stage.from_arguments())
