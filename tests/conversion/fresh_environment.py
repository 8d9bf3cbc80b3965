"""A virtual environment with no more than what some distributions require, made of links.

It is what `pip install` of them would make, of the versions that are installed here.
"""

import re
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], str):
        return  # between processes of this machine
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise OSError(f"there is no network here: {event}{arguments}")

sys.addaudithook(refuse)
"""


def make_environment(folder, names):
    """Makes it, without a network; returns its Python and its distributions by name."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (target / "sitecustomize.py").write_text(NO_NETWORK)
    owners, required = packages_distributions(), closure(names)
    for own in required.values():
        _link(own, target, owners)
    return python, required


def closure(names):
    """The named distributions and all that they require on this platform, by name."""
    found, seen, todo = {}, set(), [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = frozenset(requirement.extras) or {""}
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # whatever needs it will say so
        for text in found[name].requires or ():
            further = Requirement(text)
            if not further.marker or any(further.marker.evaluate({"extra": e}) for e in extras):
                todo.append(further)
    return found


def _link(own, target, owners):
    """Links a distribution's folders; of those that several have a part in, its files."""
    for file in own.files or ():
        if ".." in file.parts or file.is_absolute():
            continue
        shared = len(set(owners.get(file.parts[0], ()))) > 1
        part = file if shared else Path(file.parts[0])
        source, place = Path(own.locate_file(part)), target / part
        if source.exists() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)
