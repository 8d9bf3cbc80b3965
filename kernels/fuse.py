"""Stages of the portable paths that torch's compiler makes one loop of, on a CPU.

Eager torch reads and writes memory once an operation, which costs what is bound by memory several
times the fastest kernel. Where a C++ compiler is at hand, large tensors take such a loop instead.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MEGALODON_FUSE"
# Compiling takes about a second a stage and shape, which fewer numbers never win back.
FUSE_FROM = 2**19
# Shapes that a stage is compiled for; later ones run eagerly.
SHAPES = 8

logger = logging.getLogger(__name__)


def fuses(x: Tensor) -> bool:
    """Whether stages run as compiled loops on x, a float32 or bfloat16 tensor of a CPU.

    By itself that is so from FUSE_FROM numbers on. The environment variable MEGALODON_FUSE=0 says
    never, MEGALODON_FUSE=1 at any size. It is never so without a C++ compiler, nor in inference
    mode, where prompts come in all lengths and each would be compiled for.

    Raises:
        ValueError: MEGALODON_FUSE is neither 0, 1 nor empty.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {choice!r}; it must be 0, 1 or unset.")
    # A subclass, such as a fake tensor, holds no memory that a loop could read.
    if choice == "0" or x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.is_inference_mode_enabled():
        return False
    return (choice == "1" or x.numel() >= FUSE_FROM) and x.numel() > 0 and _compiler_works()


class fused:
    """Decorates a function of tensors and constants, without side effects and outside autograd.

    A call runs it compiled where `fuses` says so of `like`, by default the first argument, and
    else as it stands.
    """

    def __init__(self, stage: Callable[..., Any]) -> None:
        functools.update_wrapper(self, stage)
        self.stage = stage
        self.loops: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, *args: Any, like: Tensor | None = None) -> Any:
        with torch.no_grad():
            args = [z.detach() if isinstance(z, Tensor) else z for z in args]
            if not fuses(args[0] if like is None else like):
                return self.stage(*args)
            key = tuple(_layout(z) if isinstance(z, Tensor) else z for z in args)
            if key not in self.loops and len(self.loops) < SHAPES:
                logger.info("Compiling %s for %s", self.stage.__name__, list(args[0].shape))
                self.loops[key] = _compiled(self.stage, args)
            return self.loops.get(key, self.stage)(*args)


def pieces(x: Tensor, dim: int) -> Tensor:
    """Splits a dimension [n] to [pieces, n / pieces], for a sum over it in two steps.

    A compiled sum over rows is the work of one thread, unless there are pieces to share out.
    """
    length = x.shape[dim]
    count = max(n for n in range(1, 65) if length % n == 0)
    return x.unflatten(dim, (count if compiling() else 1, -1))


_compiling = False


def compiling() -> bool:
    """Whether a stage runs in order to be compiled."""
    return _compiling


def _layout(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype


def _compiled(stage: Callable[..., Any], args: list) -> Callable[..., Any]:
    """The stage for arguments of these shapes, strides and types, and these constants."""
    # Both take a second to import, which a stream of single tokens never needs.
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [index for index, z in enumerate(args) if isinstance(z, Tensor)]

    def of_tensors(*tensors: Tensor) -> Any:
        whole = list(args)
        for index, tensor in zip(places, tensors, strict=True):
            whole[index] = tensor
        return stage(*whole)

    tensors = [args[index] for index in places]
    with _tracing():
        graph = make_fx(of_tensors, tracing_mode="fake")(*tensors)
        loop = compile_graph(graph, tensors)

    def run(*args: Any) -> Any:
        result = loop(*(args[index] for index in places))
        # What autograd takes for several gradients.
        return tuple(result) if isinstance(result, list) else result

    return run


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Without what a caller may have switched on, as graphs are made of what is called."""
    global _compiling
    with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
        _compiling = True
        try:
            yield
        finally:
            _compiling = False


@functools.cache
def _compiler_works() -> bool:
    try:
        _compiled(lambda x: x * 2 + 1, [torch.zeros(64)])(torch.zeros(64))
    except Exception as error:
        # Whatever is missing, the eager path is there.
        logger.warning("Large tensors stay on the slower eager path: %s", error)
        return False
    return True
