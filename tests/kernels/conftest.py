"""Tests of the kernels: on the CPU, or on a card with MEGALODON_TEST_DEVICE=cuda.

On the CPU tests marked `interpreted` run in a second pytest, with Triton in its interpreter. On a
card they run as the others do; those, which test the portable paths, stay on these there.

Triton reads TRITON_INTERPRET when it is imported and when it meets a kernel, so that one process
holds either interpreted or compiled kernels. The first such test of a file that comes up sends all
that were selected there to one process; each then reports its own outcome.
"""

import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from comparing import INTERPRETED

DEVICE = os.environ.get("MEGALODON_TEST_DEVICE", "cpu")
# What these test is not on a card: compiling for the CPU, the interpreter, compiling without one.
collect_ignore = []
if DEVICE != "cpu":
    collect_ignore += ["test_plain.py", "test_kernel_traffic.py", "test_triton_compile.py"]
    # Else deterministic products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(DEVICE)
OUTCOMES = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[OUTCOMES] = {}
    if INTERPRETED:
        import interpreter

        interpreter.mend()


@pytest.fixture(autouse=True)
def portable(request, monkeypatch):
    """Keeps tests of the portable paths on them where Triton would be picked."""
    if DEVICE != "cpu" and not _interpreted(request.node):
        monkeypatch.setenv("MEGALODON_KERNELS", "torch")


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def path(request, monkeypatch):
    """The path that the module's PACKAGE takes; Triton's tiles so small that there are several."""
    module = request.module
    monkeypatch.setenv("MEGALODON_KERNELS", request.param)
    if request.param == "triton":
        kernels = import_module(f"megalodon_mcore.kernels.{module.PACKAGE}.triton")
        for name, value in module.TILES.items():
            monkeypatch.setattr(kernels, name, value)
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not _interpreted(pyfuncitem) or INTERPRETED or DEVICE != "cpu":
        return None
    outcomes = pyfuncitem.config.stash[OUTCOMES]
    path = pyfuncitem.path
    if path not in outcomes:
        items = pyfuncitem.session.items
        selected = [item for item in items if item.path == path and _interpreted(item)]
        outcomes[path] = _run(path, selected)
    failure = outcomes[path].get(pyfuncitem.name, "It did not run in the interpreting process.")
    if failure:
        pytest.fail(failure, pytrace=False)
    return True


def _interpreted(item):
    return item.get_closest_marker("interpreted") is not None


def _run(path, items):
    """What went wrong in each test, by name; empty where nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
        names = [f"{path}::{item.name}" for item in items]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *names],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=items[0].config.rootpath,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            return {item.name: done.stdout + done.stderr for item in items}
        cases = ElementTree.parse(report).iter("testcase")
        return {case.get("name"): "\n".join(part.text or "" for part in case) for case in cases}
