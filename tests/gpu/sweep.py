"""Stage 6: tile sizes of attention, CEMA and TimestepNorm; the best rows say what to write down.

A part is the name of one operator; without one, all of them are tried.
"""

import os
from contextlib import ExitStack
from unittest.mock import patch

import torch
from megalodon_mcore.kernels.cema import triton as cema
from megalodon_mcore.kernels.chunked_attention import triton as attention
from megalodon_mcore.kernels.timestep_norm import triton as timestep_norm

from ahead_of_time import SHARED_MEMORY, Report, compile_all, launches
from clock import kernel_seconds
from compiling import train
from operators import OPERATORS, SIZES, Shape
from stage import Stage

W = attention.WHOLE
TILES = {
    "weights": [(128, 64, W, W, 8, 3), (128, 64, W, W, 8, 2), (64, 64, W, W, 4, 3)]
    + [(64, 128, W, W, 8, 2), (64, 64, W, W, 4, 2), (128, 128, W, W, 8, 2)],
    "scores": [(128, 128, 64, 64, 8, 3), (128, 128, 64, 64, 8, 4), (128, 128, 128, 128, 8, 2)]
    + [(128, 128, 64, W, 8, 3), (128, 128, 64, 64, 4, 3)],
    "product": [(128, 64, 256, W, 8, 3), (128, 64, 256, W, 8, 4), (128, 128, 256, W, 8, 2)]
    + [(128, 64, 128, W, 4, 4), (64, 64, 256, W, 4, 3)],
}
CEMA = [{"CHANNELS": c, "WARPS": w} for c, w in ((8, 8), (4, 4), (4, 8), (2, 2), (2, 4), (2, 1))]
CEMA += [{"BLOCK": 32, "TILE": 1024, "CHANNELS": c, "WARPS": w} for c, w in ((4, 8), (2, 4))]
CEMA += [{"TILE": 1024, "CHANNELS": 4, "WARPS": 8}]
CEMA += [{"PROGRAMS": p} for p in (64, 256, 512)]
NORM = [{"TILE": t, "STAGES": s} for t in (1024, 2048, 4096) for s in (1, 3)]
NORM += [{"PROGRAMS": p} for p in (1024, 4096, 16384)] + [{"SCAN": s} for s in (512, 2048)]


def candidates(rehearse):
    """(operator's name, which kernels it is about, label, {module: {constant: value}})."""
    least = min(attention.TILES[2])
    for kernel, tiles in TILES.items():
        for tile in tiles[: 1 if rehearse else None]:
            chosen = attention.TILES[2][max(attention.TILES[2])]._replace(
                **{kernel: attention.Tile(*tile)}
            )
            label = f"{kernel}=Tile{tile}".replace(str(W), "WHOLE")
            yield "attention", kernel, label, {attention: {"TILES": {2: {least: chosen}}}}
    for name, module, values in (("CEMA", cema, CEMA), ("TimestepNorm", timestep_norm, NORM)):
        for constants in values[: 1 if rehearse else None]:
            label = ", ".join(f"{k} = {v}" for k, v in constants.items())
            yield name, "", label, {module: constants}


def patched(constants):
    stack = ExitStack()
    for module, values in constants.items():
        stack.enter_context(patch.multiple(module, **values))
    return stack


def main(stage):
    size = "tiny" if stage.rehearse else "7b-paper"
    shape = SIZES[size] if stage.rehearse else Shape.named(size, 16384)
    tried = [z for z in candidates(stage.rehearse) if stage.part in ("", z[0])]
    work = []
    for place, (name, _, _, constants) in enumerate(tried):
        with patched(constants):
            made = launches(train, OPERATORS[name], shape, torch.bfloat16)
        work += [(place, launch) for launch in {z.key(): z for z in made}.values()]
    # Before CUDA is used: these are forked processes.
    refused = {}
    for index, result in compile_all([(launch, 90) for _, launch in work]):
        place, launch = work[index]
        if not isinstance(result, Report) or result.shared > SHARED_MEMORY[90]:
            refused[place] = f"{launch.name}: {result}"[-200:]
    best = {}
    for place, (name, kernel, label, constants) in enumerate(tried):
        if place in refused:
            stage.add(f"{name}: {label}", "missing", problem=refused[place])
            continue

        def measure(name=name, kernel=kernel, label=label, constants=constants):
            operator = OPERATORS[name]
            leaves = operator.inputs(shape, torch.bfloat16, torch.device(stage.device))
            with patched(constants):
                upstream = [torch.ones_like(y) for y in operator.run(shape, *leaves)]
                times = kernel_seconds(
                    stage,
                    lambda: torch.autograd.grad(operator.run(shape, *leaves), leaves, upstream),
                )
            times = {n: t for n, t in times.items() if n.startswith(kernel) and "kernel" in n}
            time = sum(times.values())
            found = {} if stage.rehearse else {"ms": 1e3 * time}
            if len(times) > 1:
                found["kernels"] = {n: {"ms": 1e3 * t} for n, t in times.items()}
            if time < best.get((name, kernel), (float("inf"),))[0]:
                best[name, kernel] = (time, label)
            return "figure", found

        stage.attempt(f"{name}: {label}", measure, least=1)
    if not stage.rehearse:
        for (name, kernel), (time, label) in best.items():
            stage.add(f"{name} {kernel}: write down {label}", "figure", ms=1e3 * time)


if __name__ == "__main__":
    stage = Stage.from_arguments()
    if stage.rehearse:
        os.environ["MEGALODON_KERNELS"] = "torch"
    main(stage)
