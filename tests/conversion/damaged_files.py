"""Gives damaged files to the commands that read files: each says so in one sentence.

    python tests/conversion/damaged_files.py --cases 10000 [--seed 0] [--only convert ...]

prints what went wrong, with the seed that shows it again, and how many cases ended how.
"""

import argparse
import contextlib
import gzip
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from conversion_samples import contents, convert, hf_folder  # noqa: E402
from mutations import damage, damaged_copy  # noqa: E402

from megalodon_mcore.__main__ import main as megalodon_mcore  # noqa: E402

FORMATS = ("hf", "mcore", "released")


class Cases:
    """Good files, and one method for each command that is given damaged copies of them.

    Each method takes a folder of its own and a source of chance, and returns what was damaged and
    how that ended: "fine", "refused", or else what went wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.good = {name: folder / name for name in FORMATS}
        hf_folder(folder / "start", "one-head", tokenizer=True)
        with silence():
            for target in ("mcore", "released"):
                assert convert("hf", target, folder / "start", self.good[target]) == 0
            assert convert("mcore", "hf", self.good["mcore"], self.good["hf"]) == 0
        self.texts = folder / "texts"
        self.texts.mkdir()
        documents = [f"Document {number}, with é and 日本.\n" * 3 for number in range(8)]
        lines = "\n".join(json.dumps({"text": document, "n": [1]}) for document in documents)
        (self.texts / "a.jsonl").write_text(lines, encoding="utf-8")
        (self.texts / "b.txt").write_text("\n".join(documents), encoding="utf-8")
        (self.texts / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    def convert(self, folder: Path, random: Random) -> tuple[str, str]:
        source, target = random.choice(FORMATS), random.choice(FORMATS)
        done = damaged_copy(self.good[source], folder / "given", random)
        arguments = ("convert", "--from", source, "--to", target)
        arguments = (*arguments, folder / "given", folder / "out")
        return f"{source} to {target}, {done}", run(folder, *arguments)

    def prepare_data(self, folder: Path, random: Random) -> tuple[str, str]:
        given = folder / "given"
        given.mkdir()
        file = shutil.copy(random.choice(sorted(self.texts.iterdir())), given)
        tokenizer = shutil.copytree(self.good["mcore"] / "tokenizer", given / "tokenizer")
        what = random.choice([Path(file), *sorted(tokenizer.iterdir())])
        done = f"{what.name}: {damage(what, random)}"
        options = ("--tokenizer", tokenizer) if what.parent == tokenizer else ()
        made = ("--output-prefix", folder / "out" / "text")
        return done, run(folder, "prepare-data", file, *made, *options)

    def from_pretrained(self, folder: Path, random: Random) -> tuple[str, str]:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        done = damaged_copy(self.good["hf"], folder / "given", random, (".py", ".md"))
        try:
            with silence():
                AutoModelForCausalLM.from_pretrained(folder / "given", trust_remote_code=True)
        except (ValueError, OSError, RuntimeError, SafetensorError):
            return done, "refused"
        except Exception as error:
            # transformers has errors of other kinds for what it reads itself.
            frames = traceback.extract_tb(error.__traceback__)
            own = any(Path(frame.filename).stem.endswith("_megalodon") for frame in frames)
            return done, described(error) if own else "refused"
        return done, "fine"

    def generate(self, folder: Path, random: Random) -> tuple[str, str]:
        done = damaged_copy(self.good["mcore"], folder / "given", random)
        arguments = ("generate", "--prompt", "ab", "--tokens", "2", "--ignore-end")
        return done, run(folder, *arguments, "--checkpoint", folder / "given")


def run(folder: Path, *arguments: object) -> str:
    """How a command ended that reads folder/given and makes folder/out."""
    before, said = contents(folder / "given"), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = megalodon_mcore([*map(str, arguments)])
    except (Exception, SystemExit) as error:
        return described(error)
    if contents(folder / "given") != before:
        return "the input changed"
    if status == 0:
        return "fine"
    left = [path for path in contents(folder) if not path.startswith("given/")]
    if left:
        return f"left {left}"
    return refusal(arguments[0], status, said.getvalue())


def refusal(command: object, status: int, said: str) -> str:
    """Other libraries speak before the sentence, which is the last line and names what is wrong."""
    last = said.splitlines()[-1:]
    sentence = last and last[0].startswith(f"megalodon-mcore {command}: ") and "/given" in last[0]
    is_one = status == 2 and sentence and "Traceback" not in said
    return "refused" if is_one else f"status {status}, said {last}"


def described(error: BaseException) -> str:
    """An error that should have been a sentence, and where in this package it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "megalodon" in Path(frame.filename).parent.as_posix()]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"
    return f"{type(error).__name__} at {place}: {str(error)[:200]!r}"


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def complaints(command: str, seeds: range, folder: Path) -> tuple[list[str], Counter]:
    """Tries a command with as many seeds; what went wrong, and how many ended how."""
    torch.set_num_threads(1)
    (folder / "good").mkdir()
    case = getattr(Cases(folder / "good"), command)
    wrong, ended = [], Counter()
    for seed in seeds:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            what, how = case(Path(own), Random(seed))
        ended[how if how in ("fine", "refused") else "wrong"] += 1
        if how not in ("fine", "refused"):
            wrong.append(f"{command} {seed}: {what}: {how}")
            print(wrong[-1], file=sys.__stdout__, flush=True)
    return wrong, ended


COMMANDS = ("convert", "from_pretrained", "prepare_data", "generate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="For each command.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first case.")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    args = parser.parse_args()
    wrong = []
    for command in args.only:
        with tempfile.TemporaryDirectory() as folder:
            seeds = range(args.seed, args.seed + args.cases)
            more, ended = complaints(command, seeds, Path(folder))
        print(command, dict(ended), flush=True)
        wrong += more
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
