"""Data of the tasks beside this file, from a text of your own: --metadata '{"text": "FILE"}'."""

from __future__ import annotations

import json
import random
from pathlib import Path

from datasets import Dataset

QUESTIONS, CONTEXT, CONTINUATION, CHOICES = 100, 512, 64, 4
"""How many questions are made, and characters and answers of each."""


def documents(text: str = "", **ignored: object) -> dict[str, Dataset]:
    """The file as one document, or each `text` of a .jsonl file's lines."""
    return {"test": Dataset.from_list([{"text": own} for own in _read(text)])}


def questions(text: str = "", **ignored: object) -> dict[str, Dataset]:
    """Places of the text: how does it go on, and not elsewhere? The same ones each time."""
    chance, texts = random.Random(0), _read(text)
    whole = "\n".join(texts)
    last = len(whole) - CONTEXT - CONTINUATION
    if last < CHOICES * CONTINUATION:
        raise ValueError(f"{text} has {len(whole)} characters, too few to make questions of.")
    rows = []
    for start in (chance.randint(0, last) for _ in range(QUESTIONS)):
        middle = start + CONTEXT
        choices = [whole[middle : middle + CONTINUATION]]
        while len(choices) < CHOICES:
            other = chance.randint(0, len(whole) - CONTINUATION)
            if abs(other - middle) >= CONTINUATION:
                choices.append(whole[other : other + CONTINUATION])
        answer = chance.randrange(CHOICES)
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append({"context": whole[start:middle], "choices": choices, "answer": answer})
    return {"test": Dataset.from_list(rows)}


def prompts(text: str = "", **ignored: object) -> dict[str, Dataset]:
    """What `megalodon-mcore evaluate retrieval-data --output FILE` wrote."""
    if not text or not Path(text).is_file():
        raise FileNotFoundError(
            f"No file {text!r}; `megalodon-mcore evaluate retrieval-data` makes one."
        )
    with open(text, encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def _read(text: str) -> list[str]:
    if not text or not Path(text).is_file():
        raise FileNotFoundError(f"""No file {text!r}; name one: --metadata '{{"text": "FILE"}}'.""")
    content = Path(text).read_text(encoding="utf-8-sig")
    if text.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    return [content]
