"""Where Triton's interpreter, which runs kernels on CPU tensors, computes otherwise than a card."""

import contextlib
from functools import lru_cache
from unittest.mock import patch

import numpy as np
from triton import language
from triton.language import bfloat16, float32
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_product, _convert = InterpreterBuilder.create_dot, interpreter._convert_float
_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang


def mend():
    """Corrects the interpreter: it takes bfloat16 for integers in products, cuts digits off where a
    card rounds to it, and of Triton 3.6's a numpy that is newer than it makes no bounds of loops.
    Most of its time goes into making the language interpret, once more at each call of a function
    of a kernel: once a launch is enough.
    """

    def widened(builder, a, b, *others):
        a, b = (builder.cast_impl(z, float32) if z.dtype.scalar == bfloat16 else z for z in (a, b))
        return _product(builder, a, b, *others)

    def rounded(values, given, wanted, mode):
        if (given, wanted) != (float32, bfloat16):
            return _convert(values, given, wanted, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        up = 0x7FFF + ((bits >> 16) & 1)
        quiet = (bits >> 16) | 0x40
        return np.where(np.isnan(bits.view(np.float32)), quiet, (bits + up) >> 16).astype(np.uint16)

    def patched(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda z: int(z.handle.data.item()))

    done = set()

    def once(function):
        if not done:
            scope = _patch_language(function)
            restore = scope.restore
            scope.restore = lambda: (restore(), done.clear())
        elif _languages(function) in done:
            return None
        else:
            scope = _patch_language(function)
        done.add(_languages(function))
        return scope

    InterpreterBuilder.create_dot = widened
    interpreter._convert_float = rounded
    interpreter._patch_lang_tensor = patched
    interpreter._patch_lang = once


@lru_cache
def _languages(function):
    """The modules of Triton's language that a function of a kernel sees."""
    names = function.__globals__.values()
    return frozenset(z.__name__ for z in names if z is language or z is language.core)


@contextlib.contextmanager
def tensor_cores():
    """Products of float32 as cards compute them in TF32, with what that loses.

    Factors lose all but 10 digits. Eight products at a time are added to the sum, which is cut to
    24 digits, always towards zero: over many small terms that adds up.
    """

    def product(builder, a, b, total, *others):
        if a.dtype.scalar != float32:
            return _product(builder, a, b, total, *others)
        left, right = (_cut_to_tf32(z.data) for z in (a, b))
        sums = total.data.astype(np.float32)
        for k in range(0, left.shape[-1], 8):
            exact = sums + left[..., k : k + 8] @ right[..., k : k + 8, :]
            sums = exact.astype(np.float32)
            beyond = np.abs(sums.astype(np.float64)) > np.abs(exact)
            sums = np.where(beyond, np.nextafter(sums, np.float32(0)), sums)
        return TensorHandle(sums, total.dtype.scalar)

    with patch.object(InterpreterBuilder, "create_dot", product):
        yield


def _cut_to_tf32(z):
    return (z.view(np.int32) & -(2**13)).view(np.float32).astype(np.float64)
