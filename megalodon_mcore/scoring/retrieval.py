"""Whether a model's greedy continuation of a prompt is the answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megalodon_mcore.conversion.text import TextTokenizer
from megalodon_mcore.data.end_token import tokenize_prompt
from megalodon_mcore.scoring.causal_models import CausalModel
from megalodon_mcore.scoring.losses import nats
from megalodon_mcore.scoring.retrieval_tasks import Sample
from megalodon_mcore.scoring.run_folder import RunFolder


class Answer(NamedTuple):
    """What became of a sample."""

    right: bool
    prompt_tokens: int
    answer_nats: float


def split_tokens(tokenizer: TextTokenizer, sample: Sample) -> tuple[list[int], list[int]]:
    """The prompt's tokens, as `generate` has them, and the answer's.

    A token of the prompt's end and the answer's beginning is the answer's.
    """
    prompt = tokenize_prompt(tokenizer, sample.prompt)
    whole = tokenize_prompt(tokenizer, sample.prompt + sample.answer)
    same = 0
    while same < len(prompt) and prompt[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def score_sample(causal: CausalModel, tokenizer: TextTokenizer, sample: Sample) -> Answer:
    """Reads a prompt with its answer.

    The continuation is right if each of the answer's tokens is the likeliest after those before,
    which is when greedy decoding gives them.

    Raises:
        ValueError: the model cannot read as many tokens, or does not have one, or its loss is no
            number.
    """
    prompt, answer = split_tokens(tokenizer, sample)
    tokens = prompt + answer
    if causal.context is not None and len(tokens) - 1 > causal.context:
        raise ValueError(
            f"--lengths has {sample.length}, whose prompts take {len(tokens)} tokens, and the "
            f"model reads {causal.context} at once; give shorter ones."
        )
    if not 0 <= min(tokens) <= max(tokens) < causal.vocab_size:
        raise ValueError(
            f"The tokenizer makes token {max(tokens)} and the model has {causal.vocab_size} of "
            "them; give the right one with --tokenizer."
        )
    given = torch.tensor([tokens], device=causal.model.device)
    keep = {}
    if "logits_to_keep" in inspect.signature(causal.model.forward).parameters:
        keep["logits_to_keep"] = len(answer)
    with torch.no_grad():
        # A Megalodon with a cache reads by pieces.
        outputs = causal.model(given[:, :-1], use_cache=causal.streams, **keep)
    logits, targets = outputs.logits[0, -len(answer) :], given[0, -len(answer) :]
    loss = float(nats(logits, targets).sum())
    if not math.isfinite(loss):
        raise ValueError(
            f"The model's loss is no number in a prompt of {sample.length} bytes ({sample.task})."
        )
    return Answer(bool((logits.argmax(-1) == targets).all()), len(prompt), loss)


def score_samples(
    causal: CausalModel,
    samples: Sequence[Callable[[], Sample]],
    folder: RunFolder,
    show: Callable[[int], object],
) -> list[Answer]:
    """The answers to all samples, of which the folder's state has the first ones.

    Args:
        causal: the model.
        samples: make one each.
        folder: keeps the answers.
        show: is given the number of samples that were scored.
    """
    tokenizer = TextTokenizer(causal.tokenizer)
    answers: list[Answer] = [Answer(*own) for own in folder.state.get("answers", [])]
    show(len(answers))
    for make in samples[len(answers) :]:
        answers.append(score_sample(causal, tokenizer, make()))
        show(1)
        if folder.due():
            folder.save({"answers": answers}, {})
    folder.save({"answers": answers}, {})
    return answers


def table(cells: Sequence[tuple[str, int, float, int]], answers: Sequence[Answer]) -> list[dict]:
    """Accuracy by task, length and depth.

    Args:
        cells: each sample's task, length, depth and number.
        answers: to them.
    """
    groups: dict[tuple, list[Answer]] = {}
    for (task, length, depth, _), answer in zip(cells, answers, strict=True):
        groups.setdefault((task, length, depth), []).append(answer)
    return [
        {
            "task": task,
            "length_bytes": length,
            "depth": depth,
            "samples": len(own),
            "accuracy": sum(answer.right for answer in own) / len(own),
            "mean_prompt_tokens": sum(answer.prompt_tokens for answer in own) / len(own),
            "mean_answer_nats": sum(answer.answer_nats for answer in own) / len(own),
        }
        for (task, length, depth), own in groups.items()
    ]
