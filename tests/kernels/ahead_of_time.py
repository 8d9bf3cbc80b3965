"""Compiles Triton launches for CUDA cards with no card, and reads what the machine code takes.

What is compiled is what a card's first launch would compile, down to the key in Triton's cache on
disk: Triton itself specializes the arguments, and is only told which card is there.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Shared memory that a block can have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_run = JITFunction.run


class Report(NamedTuple):
    """Registers of a thread, bytes that it spills, bytes of shared memory of a block."""

    registers: int
    spilled: int
    shared: int


class _Card:
    """Triton's driver as far as compiling asks it; devices are told apart by their capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    """A kernel with the arguments of a call; its tensors may be on the meta device."""

    kernel: JITFunction
    arguments: tuple
    keywords: dict

    @property
    def name(self):
        """The operator's package and the kernel."""
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}"

    @property
    def grid(self):
        return self.keywords["grid"]

    def key(self):
        """Equal for launches that are compiled once for all of them."""
        given = []
        for parameter, z in zip(self.kernel.params, self.arguments, strict=False):
            if isinstance(z, torch.Tensor):
                given.append(z.dtype)
            elif isinstance(z, int) and not parameter.is_constexpr:
                special = not parameter.do_not_specialize
                given.append((special and z == 1, special and z % 16 == 0, abs(z) < 2**31))
            else:
                given.append(z)
        constants = {k: v for k, v in self.keywords.items() if k not in ("grid", "warmup")}
        return f"{self.name} {given} {sorted(constants.items())}"

    def compile(self, capability):
        """Triton's compiled kernel."""
        with _active(_Card(capability)):
            return _run(self.kernel, *self.arguments, **self.keywords | {"warmup": True})

    def tensors(self):
        """The tensors it is given."""
        given = [*self.arguments, *self.keywords.values()]
        return [z for z in given if isinstance(z, torch.Tensor)]


@contextlib.contextmanager
def _active(card):
    before, driver._active = driver._active, card
    try:
        yield
    finally:
        driver._active = before


def launches(function, *arguments, **keywords):
    """Every launch that a function would make, without making it."""
    seen = []

    def run(kernel, *given, **named):
        seen.append(Launch(kernel, given, named))

    with (
        patch.object(JITFunction, "run", run),
        # There is no autocast of the meta device, to be switched off either.
        patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        patch.dict(os.environ, {"MEGALODON_KERNELS": "triton"}),
    ):
        function(*arguments, **keywords)
    return seen


def report(compiled):
    """What a compiled kernel takes, read from its machine code."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [folder / "cuobjdump", "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return Report(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def compile_all(jobs, processes=None):
    """Compiles (launch, capability) pairs in many processes; yields their places and reports.

    A place comes with a Report, or with what went wrong, as soon as it is done. Processes are
    forked: CUDA must not have been used before.
    """
    jobs = list(jobs)
    with get_context("fork").Pool(processes or os.cpu_count(), _start, (jobs,)) as pool:
        yield from pool.imap_unordered(_compile, range(len(jobs)))


def _start(jobs):
    global _jobs
    _jobs = jobs
    torch.set_num_threads(1)


def _compile(place):
    launch, capability = _jobs[place]
    try:
        return place, report(launch.compile(capability))
    except Exception as error:  # whatever it is, it is that kernel's result
        return place, f"{type(error).__name__}: {error}"
