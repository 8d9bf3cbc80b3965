"""Damages files at random, by a seed: what is done to bytes, and to values in JSON."""

import json
import shutil
from pathlib import Path
from random import Random

ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -1e300, float("nan")),
    *("", "x", "../..", "é\u0000", [], [[]], [1, "a"], {}, {"a": {}}),
)


def damaged_copy(good: Path, copy: Path, random: Random, skip: tuple[str, ...] = (".py",)) -> str:
    """Copies a folder, one file of it damaged; returns what was done to which."""
    shutil.copytree(good, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.suffix not in skip)
    file = random.choice(files)
    return f"{file.relative_to(copy)}: {damage(file, random)}"


def damage(file: Path, random: Random) -> str:
    """Damages a file; returns what was done."""
    if file.suffix in (".json", ".jsonl") and random.random() < 0.7:
        change = _change_json
    else:
        change = random.choice(CHANGES)
    return change(file, random)


def _change_json(file: Path, random: Random) -> str:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    number = random.randrange(len(lines))
    value = json.loads(lines[number])
    places = list(_places(value))
    if not places:
        return _flip(file, random)
    container, key = random.choice(places)
    if random.random() < 0.2:
        del container[key]
        done = "deleted"
    else:
        container[key] = random.choice(ODD_VALUES)
        done = repr(container[key])
    lines[number] = json.dumps(value)
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"{key!r} {done}"


def _places(value):
    """Every value below this one, as a container and a key; the first of long lists alone."""
    if isinstance(value, dict):
        items = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value))[:3]
    else:
        return
    for key, below in items:
        yield value, key
        yield from _places(below)


def _flip(file: Path, random: Random) -> str:
    """Bits of some bytes, near the ends more often: that is where files say what they hold."""
    content = bytearray(file.read_bytes())
    if not content:
        return "left empty"
    places = []
    for _ in range(random.choice((1, 1, 1, 4, 64))):
        near = min(len(content), random.choice((64, 1024, len(content))))
        place = random.randrange(near)
        places.append(place if random.random() < 0.5 else len(content) - 1 - place)
        content[places[-1]] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    return f"bytes {places[:4]} flipped"


def _cut(file: Path, random: Random) -> str:
    content = file.read_bytes()
    kept = random.choice((0, 1, 8, random.randrange(len(content) + 1), max(0, len(content) - 1)))
    file.write_bytes(content[:kept])
    return f"cut to {kept}"


def _double(file: Path, random: Random) -> str:
    file.write_bytes(file.read_bytes() * 2)
    return "appended to itself"


def _append(file: Path, random: Random) -> str:
    file.write_bytes(file.read_bytes() + random.randbytes(random.choice((1, 100))))
    return "garbage appended"


def _prepend(file: Path, random: Random) -> str:
    file.write_bytes(random.randbytes(random.choice((1, 100))) + file.read_bytes())
    return "garbage in front"


def _blank(file: Path, random: Random) -> str:
    """A block that the disk never wrote."""
    content = bytearray(file.read_bytes())
    start = random.randrange(len(content) + 1)
    stop = min(len(content), start + random.choice((1, 16, 512)))
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)
    return f"[{start}:{stop}] zeroed"


def _garbage(file: Path, random: Random) -> str:
    file.write_bytes(random.randbytes(random.choice((3, 300))))
    return "garbage"


def _remove(file: Path, random: Random) -> str:
    file.unlink()
    return "removed"


def _folder(file: Path, random: Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


CHANGES = (
    *(_flip, _flip, _flip, _flip, _cut, _cut, _double, _append, _prepend, _blank, _blank),
    *(_garbage, _remove, _folder),
)
