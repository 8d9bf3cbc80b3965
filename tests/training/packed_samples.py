"""Short documents and conversations, and a tokenizer that marks them."""

import json
import random
from pathlib import Path

from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from megalodon_mcore.data.prepare import prepare_data

MARKS = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<SPECIAL_233>", "<unk>")
FIM_MARKS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")


def marked_tokenizer(folder: Path) -> Path:
    """The byte tokenizer with tokens of Megatron's prompt formats and of FIM."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_byte_tokenizer(folder / "bytes"))
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, *FIM_MARKS]})
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(folder / "marked")
    return folder / "marked"


def document_prefixes(
    folder: Path, names: tuple[str, ...], tokenizer: str = "byte", documents: int = 200
) -> list[str]:
    """Indexed datasets of so many documents each, of 2 to 40 tokens."""
    prefixes = []
    for number, name in enumerate(names):
        pick = random.Random(number)
        lines = ["".join(pick.choices("abcde ", k=pick.randint(1, 39))) for _ in range(documents)]
        (folder / f"{name}.txt").write_text("\n".join(line.strip() or "a" for line in lines))
        prepared = prepare_data(
            [folder / f"{name}.txt"],
            folder / name,
            documents="line",
            tokenizer=tokenizer,
            progress=False,
        )
        prefixes.append(prepared.datasets["all"].prefix)
    return prefixes


def conversation(pick: random.Random) -> list[dict[str, str]]:
    """Instruction, question and answer, of a few words."""
    words = ["".join(pick.choices("abcde", k=pick.randint(1, 9))) for _ in range(3)]
    return [
        {"role": role, "content": word}
        for role, word in zip(("system", "user", "assistant"), words, strict=True)
    ]


def conversations(file: Path, lines: int = 12, seed: int = 0) -> str:
    """A file of packs of one to four conversations."""
    pick = random.Random(seed)
    packs = [sum((conversation(pick) for _ in range(pick.randint(1, 4))), []) for _ in range(lines)]
    file.write_text("\n".join(json.dumps({"messages": pack}) for pack in packs))
    return str(file)
