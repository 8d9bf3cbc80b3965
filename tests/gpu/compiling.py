"""Stage 1: every kernel as the operators launch it, compiled in many processes at once.

What is compiled lies in Triton's cache for the later stages. It takes no card, and other stages
come first of all to the compiler's errors, so a rehearsal does all of it.
"""

from unittest.mock import patch

import torch
from megalodon_mcore.kernels.chunked_attention import triton as attention_kernels

from ahead_of_time import SHARED_MEMORY, Report, compile_all, launches
from operators import DROPOUT, OPERATORS, VARIANTS, Shape
from stage import Stage

EVERY = OPERATORS | VARIANTS | {"attention, dropout": DROPOUT}
# Bytes of 1,020 in a thread's registers that may lie in memory: what one version of ptxas holds,
# another does not, and a dozen registers cost a loop of 1,400 instructions nothing.
MAY_SPILL = 48


def train(operator, shape, dtype):
    """Forward and backward on the meta device."""
    leaves = operator.inputs(shape, dtype, torch.device("meta"))
    outputs = operator.run(shape, *leaves)
    upstream = [torch.empty_like(y) for y in outputs]
    torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def jobs(size, types, capability, length=4096):
    """(case, launch) of all operators of a size."""
    memory = {"shared_memory": lambda device: SHARED_MEMORY[capability]}
    with patch.multiple(attention_kernels, **memory):
        for dtype in types:
            shape = Shape.named(size, length)
            # Too few channels to fill a card, and steps that fill no block.
            ragged = shape.divided(8)._replace(length=length - 5)
            for name, operator in EVERY.items():
                for given in (shape, ragged) if "CEMA" in name else (shape,):
                    for launch in launches(train, operator, given, dtype):
                        yield f"{size} {str(dtype)[6:]} {name}", launch


def compile_rows(stage, work):
    """Compiles (capability, case, launch) in many processes at once, and adds a row for each."""
    pending = dict(enumerate(work))
    for place, result in compile_all([(launch, card) for card, _, launch in work]):
        card, case, launch = pending.pop(place)
        constants = {
            k: v for k, v in launch.keywords.items() if k in ("OF_QUERIES", "COLUMNS", "REVERSE")
        }
        found = {"kernel": launch.name, "capability": card, **constants}
        if isinstance(result, Report):
            found |= result._asdict()
            fits = result.spilled <= MAY_SPILL and result.shared <= SHARED_MEMORY[card]
        else:
            found["problem"], fits = result[-400:], False
        stage.add(case, "pass" if fits else "fail", **found)
        if stage.left < 0:
            break
    for card, case, launch in pending.values():
        stage.add(case, "cut", kernel=launch.name, capability=card)


def parts(stage):
    """(capability, size, types) of a part such as `90:200m:bfloat16,float16 80:1.3b:float32`."""
    for words in stage.part.split():
        card, size, types = words.split(":")
        yield int(card), size, [getattr(torch, name) for name in types.split(",")]


if __name__ == "__main__":
    stage = Stage.from_arguments()
    work = {}
    for card, size, types in parts(stage):
        for case, launch in jobs(size, types, card):
            work.setdefault((card, launch.key()), (card, case, launch))
    compile_rows(stage, list(work.values()))
