"""Retrieval prompts are what they say and the same each time, and answers are scored exactly."""

import itertools
import json
import math

import pytest
import torch

from megalodon_mcore.conversion.model import Tokenizer
from megalodon_mcore.conversion.text import TextTokenizer
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER
from megalodon_mcore.scoring import retrieval
from megalodon_mcore.scoring.causal_models import CausalModel
from megalodon_mcore.scoring.retrieval_tasks import TASKS, Sample, make_sample
from scoring.scored_models import build, evaluate, results, save

GIVEN = list(itertools.product(TASKS, [400, 3001], [0.0, 0.3, 1.0], [1, 3], [0, 5]))


def made(task, length, depth, needles, distractors, number=0, seed=0):
    return make_sample(task, length, depth, number, seed, needles, distractors)


@pytest.mark.parametrize(("task", "length", "depth", "needles", "distractors"), GIVEN)
def test_prompts_have_their_length_and_the_needle_its_depth(
    task, length, depth, needles, distractors
):
    sample = made(task, length, depth, needles, distractors)
    assert len(sample.prompt.encode()) == length
    separator = " and " if task == "passkey" else " "
    values = sample.answer.strip().removesuffix(".").split(separator)
    assert len(set(values)) == needles
    places = [sample.prompt.index(value) for value in values]
    assert all(sample.prompt.count(value) == 1 for value in values)
    # What else is placed before it, and whole sentences or lines, move it a little.
    if depth == 0:
        assert places[0] < 120 + 40 * (needles + distractors)
    room = length - 100
    assert places[0] == pytest.approx(depth * room, abs=130 + 40 * (needles + distractors))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_depend_on_their_arguments_alone(task):
    one, two = made(task, 600, 0.5, 1, 2), made(task, 600, 0.5, 1, 2)
    assert one == two
    others = [
        made(task, 600, 0.5, 1, 2, number=1),
        made(task, 600, 0.5, 1, 2, seed=1),
        made(task, 601, 0.5, 1, 2),
    ]
    assert len({own.answer for own in (one, *others)}) == 4


def test_distractors_are_like_what_is_asked_for():
    sample = made("key-value", 900, 0.5, 1, 6)
    asked = sample.prompt.rpartition("\n")[2].removesuffix(":")
    keys = [line.partition(":")[0] for line in sample.prompt.splitlines()[1:-1]]
    assert len([key for key in keys if key[:-1] == asked[:-1]]) == 7
    whole = [key for key in keys if len(key) == 8]
    assert len(set(whole)) == len(whole)
    sample = made("passkey", 900, 0.5, 2, 4)
    assert sample.prompt.count("The key of ") == 6


@pytest.mark.parametrize("kind", ["megalodon", "mixed", "llama"])
def test_an_answer_is_right_if_greedy_generation_gives_it(kind):
    model, tokenizer = build(kind), Tokenizer(NULL_TOKENIZER, (), 0)
    prompt = list(range(5, 30))
    greedy = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    causal = CausalModel(model, tokenizer, None, model.config.vocab_size, kind != "llama", None)
    text = " ".join(map(str, prompt))

    def score(answer):
        sample = Sample("passkey", 0, 0.0, 0, text, " " + " ".join(map(str, answer)))
        return retrieval.score_sample(causal, TextTokenizer(tokenizer), sample)

    right = score(greedy)
    assert right.right and right.prompt_tokens == len(prompt)
    whole = torch.tensor([prompt + greedy])
    labels = whole.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        loss = model(whole, labels=labels, use_cache=False).loss.item()
    assert right.answer_nats == pytest.approx(6 * loss, rel=1e-5)
    for place in range(6):
        wrong = list(greedy)
        wrong[place] = (wrong[place] + 1) % 200
        assert not score(wrong).right


def test_a_loss_that_is_no_number_is_no_wrong_answer():
    model = build("llama")
    model.lm_head.weight.data[:] = math.inf
    causal = CausalModel(model, Tokenizer(NULL_TOKENIZER, (), 0), None, 257, False, None)
    sample = Sample("passkey", 7, 0.0, 0, "1 2 3", " 4")
    with pytest.raises(ValueError, match=r"loss is no number in a prompt of 7 bytes \(passkey\)"):
        retrieval.score_sample(causal, TextTokenizer(causal.tokenizer), sample)


def test_a_token_across_the_prompts_end_is_the_answers():
    class Pairs:
        """Two characters a token."""

        eod = -1

        def tokenize(self, text):
            return [hash(text[n : n + 2]) for n in range(0, len(text), 2)]

    sample = Sample("passkey", 0, 0.0, 0, "abc", "de")
    prompt, answer = retrieval.split_tokens(Pairs(), sample)
    assert prompt == [hash("ab")] and answer == [hash("cd"), hash("e")]


def test_the_command_writes_a_table_and_a_heat_map_and_goes_on(tmp_path, monkeypatch, capsys):
    folder = save("megalodon", tmp_path / "model")
    given = [
        *("retrieval", "--checkpoint", folder, "--lengths", 300, 500, "--depths", 0, 1),
        *("--samples", 2, "--needles", 2, "--distractors", 1, "--save-every", 0, "--output"),
    ]
    assert evaluate(*given, tmp_path / "whole") == 0
    assert "key-value, 500 bytes: 0.0% right" in capsys.readouterr().out
    score, calls = retrieval.score_sample, []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(retrieval, "score_sample", stopping)
    assert evaluate(*given, tmp_path / "stopped") == 130
    assert evaluate(*given, tmp_path / "stopped") == 0
    assert len(calls) == 7 + 16 - 6
    found = results(tmp_path / "stopped")
    assert found == results(tmp_path / "whole")
    assert [(row["task"], row["length_bytes"], row["depth"]) for row in found["cells"]] == list(
        itertools.product(["passkey", "key-value"], [300, 500], [0, 1])
    )
    assert all(row["samples"] == 2 for row in found["cells"])
    assert all(row["mean_prompt_tokens"] == row["length_bytes"] for row in found["cells"])
    assert (tmp_path / "stopped" / "retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_as_data_are_those_that_are_scored(tmp_path):
    path = tmp_path / "data" / "prompts.jsonl"
    given = ["--lengths", 300, "--depths", 0.5, "--samples", 2, "--seed", 7, "--distractors", 1]
    assert evaluate("retrieval-data", "--output", path, *given) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        make_sample(task, 300, 0.5, number, 7, 1, 1)._asdict()
        for task in TASKS
        for number in range(2)
    ]
    assert rows == expected
