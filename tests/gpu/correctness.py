"""Stage 2: every operator's values and all its gradients against float64, computed on the card.

Inputs and cotangents are random; what torch allocates holds NaN before a kernel writes it; each
case runs twice and has to give the same bits. Short sequences are held to the loops of the
definitions, long ones to the portable path in float64, which is held to those loops as well. Of a
million positions the end is compared.
"""

from unittest.mock import patch

import torch
from megalodon_mcore.kernels.cema.naive import cema_naive
from megalodon_mcore.kernels.chunked_attention import chunked_attention_naive
from megalodon_mcore.kernels.gates import gated_silu_naive, swiglu_naive
from megalodon_mcore.kernels.query_key import query_key_naive
from megalodon_mcore.kernels.row_norm import layer_norm_naive, rms_norm_naive
from megalodon_mcore.kernels.timestep_norm import timestep_norm_naive

import operators
from comparing import INTERPRETED, error, poisoned
from operators import OPERATORS, VARIANTS, Shape
from stage import Stage

EVERY = OPERATORS | VARIANTS
REHEARSED = ("TimestepNorm, stream", "RMSNorm")
# As the operators call them.
NAIVE = {
    "cema": lambda *given: cema_naive(*given[:8]),
    "cema_summary": lambda x, alpha, *rest: cema_naive(
        x, alpha, *rest, alpha.expand(-1, -1, 2), alpha[:, 0]
    )[1],
    "chunked_attention": chunked_attention_naive,
    "gated_silu": gated_silu_naive,
    "layer_norm": layer_norm_naive,
    "query_key": query_key_naive,
    "rms_norm": rms_norm_naive,
    "swiglu": swiglu_naive,
    "timestep_norm": timestep_norm_naive,
}
TYPES = (torch.bfloat16, torch.float32)
# Longer sequences take the loops too long; those of queries and keys go over pairs as well.
LONGEST_LOOP, LONGEST_LOOP_OVER_PAIRS = 700, 100
# Errors, relative to the largest value of a tensor, by the type that the tensor has.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-5}
BOUNDS |= {torch.complex64: 1e-5}


def cases(rehearse):
    """(label, Shape, types): ragged shapes, and those of real layers."""
    ragged = Shape(2, 77, 24, 3, 3, 32, 64, 24, 80)
    single = Shape(3, 1, 16, 2, 1, 16, 40, 16, 48)
    if rehearse:
        # The interpreter is slow, and tests/kernels has more in it.
        return [("3 heads", ragged, TYPES[:1]), ("1 step", single, TYPES[1:])]
    return [
        ("3 heads", ragged, (*TYPES, torch.float16)),
        ("1 step", single, TYPES),
        ("2 heads", Shape(1, 613, 256, 8, 2, 64, 256, 200, 320), TYPES),
        ("200m", Shape.named("200m", 2053, batch=2), TYPES),
        ("7b-paper", Shape.named("7b-paper", 2053), TYPES),
        ("7b-paper", Shape.named("7b-paper", 16387), TYPES),
    ]


def million(rehearse):
    """A shape whose places do not fit in 32 bits, and which share of it is compared."""
    if rehearse:
        return Shape(1, 99, 32, 4, 1, 16, 32, 32, 48), 2
    return Shape.named("7b-paper", 2**20 + 3)._replace(heads=1, ffn=2048), 64


def check(operator, shape, dtype, device, share=1):
    """The verdict, and the worst of the results beside its bound."""
    leaves = operator.inputs(shape, dtype, device)
    part, cut = (shape, lambda z: z) if share == 1 else operator.last(shape, share)
    # Of the longest, what is compared and a sample is all that there is room for.
    kept = (lambda z: [z]) if share == 1 else lambda z: [cut(z).clone(), z.flatten()[::97].clone()]
    runs, cotangents = [], None
    for _ in range(2):
        with poisoned():
            outputs = operator.run(shape, *leaves)
            if cotangents is None:
                cotangents = [cotangent(y, cut) for y in outputs]
            gradients = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
            runs.append([kept(z.detach()) for z in (*outputs, *gradients)])
            del outputs, gradients
    equal = all(
        torch.equal(a, b) for pair in zip(*runs, strict=True) for a, b in zip(*pair, strict=True)
    )
    actual = [first for first, *_ in runs[0]]

    doubles = [double(cut(leaf.detach())).requires_grad_() for leaf in leaves]
    wanted = reference(operator, part, doubles)
    upstream = [double(cut(z)) for z in cotangents]
    wanted += torch.autograd.grad(wanted, doubles, upstream, materialize_grads=True)

    worst, finite = (0.0, 0.0, ""), True
    names = [f"output {i}" for i in range(len(cotangents))]
    names += [f"gradient {i}" for i in range(len(leaves))]
    for name, a, w in zip(names, actual, wanted, strict=True):
        finite &= bool(a.isfinite().all())
        half = a.element_size() == 2
        bound = BOUNDS[a.dtype]
        if not operator.memory_bound and half:
            # Weights and their gradients are rounded, too, before they meet the values.
            bound *= 3
        if operator is EVERY["CEMA, stream"] and half and name == "gradient 0":
            # A sum of two rounded tensors, rounded: what y adds, and what the state does. Measured
            # under the interpreter: 1.07 of the bound.
            bound *= 1.5
        # Where everything cancels in float64, the error is one of terms of size 1.
        found = error(a, w) if w.any() or not w.numel() else float(a.detach().abs().max())
        worst = max(worst, (found / bound, found, name, bound))
    good = equal and finite and worst[0] <= 1
    found = {"error": worst[1], "bound": worst[3], "of": worst[2], "twice_equal": equal}
    return "pass" if good else "fail", found | {"finite": finite}


def cotangent(y, cut):
    """Random, and zero outside of what is compared."""
    drawn = torch.randn(y.shape, dtype=y.dtype, device=y.device)
    kept = torch.zeros_like(drawn)
    cut(kept).copy_(cut(drawn))
    return kept


def double(z):
    return z.to(torch.complex128 if z.is_complex() else torch.float64)


def has_loops(operator, shape):
    over_pairs = any(operator is EVERY[name] for name in EVERY if name.startswith("query and key"))
    return shape.length <= (LONGEST_LOOP_OVER_PAIRS if over_pairs else LONGEST_LOOP)


def reference(operator, shape, doubles):
    """Outputs in float64: by the loops, or by the portable path, which float64 always takes."""
    if has_loops(operator, shape):
        with patch.multiple(operators, **NAIVE):
            return list(operator.run(shape, *doubles))
    return list(operator.run(shape, *doubles))


def check_reference(operator, shape, device):
    """The portable path in float64 against the loops."""
    leaves = operator.inputs(shape, torch.float64, device)
    with patch.multiple(operators, **NAIVE):
        wanted = operator.run(shape, *leaves)
    outputs = operator.run(shape, *leaves)
    upstream = [torch.randn_like(y) for y in outputs]
    values = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    wanted = [*wanted, *torch.autograd.grad(wanted, leaves, upstream)]
    worst = max(error(a, w) for a, w in zip(values, wanted, strict=True))
    return "pass" if worst < 1e-10 else "fail", {"error": worst, "bound": 1e-10}


def check_millions(stage):
    """One operator after the other: each takes most of the card's memory."""
    shape, share = million(stage.rehearse)
    for name, operator in OPERATORS.items():
        if stage.rehearse and name not in REHEARSED:
            continue
        stage.attempt(
            f"{name}, L {shape.length}, bfloat16",
            lambda operator=operator: check(
                operator, shape, torch.bfloat16, torch.device(stage.device), share
            ),
        )
        if not stage.rehearse:
            torch.cuda.empty_cache()


def main(stage):
    if INTERPRETED:
        import interpreter

        interpreter.mend()
    torch.manual_seed(0)
    if stage.part == "million":
        check_millions(stage)
        return
    name = stage.part
    operator, device = EVERY[name], torch.device(stage.device)
    for label, shape, types in cases(stage.rehearse):
        if has_loops(operator, shape):
            stage.attempt(
                f"{name}, {label}, float64",
                lambda shape=shape: check_reference(operator, shape, device),
            )
        for dtype in types:
            stage.attempt(
                f"{name}, {label}, L {shape.length}, {str(dtype)[6:]}",
                lambda shape=shape, dtype=dtype: check(operator, shape, dtype, device),
            )


if __name__ == "__main__":
    main(Stage.from_arguments())
