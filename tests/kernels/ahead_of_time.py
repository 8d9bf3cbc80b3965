"""Compiles Triton launches for CUDA cards with no card, and reads what ptxas says of them."""

import contextlib
import io
import re
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Shared memory that a block can have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel with the arguments and compile-time constants of a call."""

    kernel: JITFunction
    arguments: tuple
    keywords: dict

    def source(self):
        """What Triton would compile for it, specialised as at a real launch."""
        names = self.kernel.arg_names
        values = dict(zip(names, self.arguments, strict=False))
        values |= {k: v for k, v in self.keywords.items() if k not in (*OPTIONS, "grid", "warmup")}
        constexprs = {names[p.num] for p in self.kernel.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if name in constexprs or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                signature[name] = "fp32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def options(self):
        return {name: self.keywords[name] for name in OPTIONS if name in self.keywords}


class Report(NamedTuple):
    """What ptxas says, in registers of a thread and bytes."""

    registers: int
    spilled: int
    shared: int


def launches(function, *arguments, **keywords):
    """Every launch that a function would make; its tensors may be on the meta device."""
    seen = []

    def run(kernel, *given, **named):
        seen.append(Launch(kernel, given, named))

    original, JITFunction.run = JITFunction.run, run
    try:
        function(*arguments, **keywords)
    finally:
        JITFunction.run = original
    return seen


def compile_for(launch, capability):
    """Compiles down to a cubin for a compute capability, 80 for 8.0."""
    output = io.StringIO()
    nvidia = triton.knobs.nvidia
    with triton.knobs.compilation.scope(), nvidia.scope(), contextlib.redirect_stdout(output):
        triton.knobs.compilation.always_compile = True
        nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options()
        )
    assert compiled.asm["cubin"]
    log = output.getvalue()
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return Report(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(stores) + int(loads),
        shared=compiled.metadata.shared,
    )
