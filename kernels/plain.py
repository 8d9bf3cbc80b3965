"""Operators written as plain functions of tensors, which torch compiles for a CPU where that pays.

Eager torch reads and writes memory once an operation, which costs what is bound by memory several
times the fastest kernel. Of a large tensor on a CPU the compiler makes one loop or two instead;
elsewhere, and without a C++ compiler, the same function runs as it stands.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Compiling takes seconds, which fewer numbers hardly win back.
COMPILE_FROM = 2**21

logger = logging.getLogger(__name__)
_compiler_works = True


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an operator of a differentiable function, which keeps nothing but its arguments.

    The function takes floating tensors, which it may be differentiated in (once), and after them
    what it may not: numbers, and tensors of other types. Backward computes it anew.
    """

    def gradient(constants: tuple, grads: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda *given: function(*given, *constants), *tensors)[1](grads)

    # The compiler counts what it made by code object, which all gradients would share.
    gradient.__code__ = gradient.__code__.replace(co_name=f"{function.__name__}_gradient")
    run, run_gradient = _Compiled(function), _Compiled(gradient)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, constants: tuple, *tensors: Tensor) -> Any:
            ctx.save_for_backward(*tensors)
            ctx.constants = constants
            return run(tensors[0], *tensors, *constants)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            given = grads if len(grads) > 1 else grads[0]
            return None, *run_gradient(tensors[0], ctx.constants, given, *tensors)

    @functools.wraps(function)
    def operator(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        count = sum(isinstance(z, Tensor) and z.is_floating_point() for z in args)
        return Operator.apply(args[count:], *args[:count])

    return operator


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function without autograd, compiled where that pays for its first tensor."""
    run = _Compiled(function)
    return functools.wraps(function)(lambda x, *args: run(x, x, *args))


class _Compiled:
    """Runs a function without autograd, compiled where `_pays_to_compile` says so of a tensor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        # For the first sizes alone, then for any.
        return torch.compile(self.function)

    def __call__(self, like: Tensor, *args: Any) -> Any:
        global _compiler_works
        with torch.no_grad():
            if _pays_to_compile(like):
                try:
                    with _default_stance():
                        return self.compiled(*args)
                except Exception as error:
                    _compiler_works = False
                    logger.warning("Large tensors stay on the slower eager path: %s", error)
            return self.function(*args)


def _pays_to_compile(x: Tensor) -> bool:
    """Whether compiling for a tensor is worth it.

    A subclass, such as a fake tensor, has no memory, and prompts come in all lengths.
    """
    return (
        _compiler_works
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() >= COMPILE_FROM
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.is_inference_mode_enabled()
    )


@contextlib.contextmanager
def _default_stance() -> Iterator[None]:
    """Compiles whatever stance a process takes, and sees no torch function modes."""
    with torch.compiler.set_stance("default"), torch._C.DisableTorchFunction():
        yield
