"""Stage 4: each operator and each of its kernels beside its peers, as a share of the roofline.

The roofline of an operator: its inputs and outputs once through memory, and the flops that the
mathematics asks for, at the card's own best. That of a kernel: the tensors that it is given, once.
"""

import os

import torch

import peers
from ahead_of_time import launches
from clock import card, ceilings, kernel_seconds, seconds
from compiling import train
from operators import OPERATORS, SIZES, VARIANTS, Shape
from stage import Stage

TIMED = OPERATORS | {name: z for name, z in VARIANTS.items() if name.endswith("packed")}


def peers_of(name, shape):
    """Functions of the leaves that compute the same, without those that are compiled."""
    if name == "CEMA":
        return {"plain FFT": lambda x, *rest: (peers.cema_by_fft(x.float(), *rest).to(x.dtype),)}
    if name == "attention":
        return {
            "bmm by panels": lambda *leaves: (peers.attention_by_panels(*leaves, shape.chunk),),
            "SDPA on split heads": lambda *leaves: (
                peers.attention_by_split_heads(*leaves, shape.chunk),
            ),
        }
    return {}


class Timer:
    """Times ways to compute an operator; ratios and differences are to the first, ours."""

    def __init__(self, stage, size, shape, name, best):
        self.stage, self.shape, self.best = stage, shape, best
        self.case, self.operator = f"{size} {name}", TIMED[name]
        self.ours, self.wanted = None, None

    def row(self, way, function):
        """Adds a row of a way."""
        self.stage.attempt(f"{self.case}: {way}", lambda: self.measure(function), least=1)

    def measure(self, function):
        dtype, first = torch.bfloat16, self.wanted is None
        torch.manual_seed(0)
        leaves = self.operator.inputs(self.shape, dtype, torch.device(self.stage.device))
        outputs = function(*leaves)
        upstream = [torch.ones_like(y) for y in outputs]

        def both():
            return torch.autograd.grad(function(*leaves), leaves, upstream)

        values = [z.detach() for z in (*outputs, *both())]
        found = {} if first else {"difference": difference(values, self.wanted)}
        self.wanted = values if first else self.wanted
        forward = seconds(self.stage, lambda: function(*leaves))
        total = seconds(self.stage, both)
        times = kernel_seconds(self.stage, both) if first else {}
        moved = kernel_bytes(self.operator, self.shape, dtype) if first else {}
        if self.stage.rehearse:
            return "figure", found
        given, returned = size_of(leaves), size_of(outputs)
        flops = self.operator.flops(self.shape)
        floors = [
            self.best.floor(given + returned, flops[0]),
            self.best.floor(2 * given + returned, flops[1]),
        ]
        self.ours = total if first else self.ours
        found |= {"forward_ms": 1e3 * forward, "both_ms": 1e3 * total}
        found |= {"forward_share": floors[0] / forward, "both_share": sum(floors) / total}
        if first:
            found["kernels"] = {name: self.kernel_row(name, z, moved) for name, z in times.items()}
        else:
            found["this_over_ours"] = total / self.ours if self.ours else None
        return "figure", found

    def kernel_row(self, name, time, moved):
        """A kernel's time, and as its share of it what its bytes and flops take at least."""
        row = {"ms": 1e3 * time}
        if name in moved:
            flops = kernel_flops(self.shape, self.operator.flops(self.shape)).get(name, 0)
            row["share"] = self.best.floor(moved[name], flops) / time
        return row


def kernel_flops(shape, flops):
    """The flops that the mathematics asks of each kernel, by its name; of others none."""
    forward, backward = flops
    # Attention's backward takes the scores anew, and as much again for the weights' gradients.
    weights = forward * shape.key_width / (shape.key_width + shape.value_width)
    return {
        **{"forward_kernel": forward, "backward_kernel": backward},
        **{"weights_kernel": weights, "scores_kernel": forward},
        "product_kernel": backward - weights,
    }


def kernel_bytes(operator, shape, dtype):
    """Bytes of the tensors that each kernel is given, over its launches in a step."""
    moved = {}
    for launch in launches(train, operator, shape, dtype):
        name = launch.kernel.__name__
        moved[name] = moved.get(name, 0) + size_of(launch.tensors())
    return moved


def size_of(tensors):
    return sum(z.numel() * z.element_size() for z in tensors)


def difference(values, wanted):
    """The largest of two ways' results, relative to the largest of each."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(values, wanted, strict=True)
    )


def main(stage):
    best = ceilings(stage)
    stage.add("card", "figure", **card(stage), **(best._asdict() if best else {}))
    timers = {}
    for size in ["tiny"] if stage.rehearse else ["7b-paper", "200m"]:
        shape = SIZES[size] if stage.rehearse else Shape.named(size, 16384)
        for name, operator in TIMED.items():
            timer = timers[size, name] = Timer(stage, size, shape, name, best)
            timer.row("kernels", lambda *leaves, o=operator, s=shape: o.run(s, *leaves))
            for way, function in peers_of(name, shape).items():
                timer.row(way, function)
    # The compiler takes seconds for each.
    for (_, name), timer in timers.items():
        if name in peers.PLAIN:
            plain, shape = peers.PLAIN[name], timer.shape
            timer.row(
                "torch.compile",
                torch.compile(lambda *leaves, f=plain, s=shape: f(s, *leaves), dynamic=False),
            )


if __name__ == "__main__":
    stage = Stage.from_arguments()
    if stage.rehearse:
        # Under the interpreter nothing could be recorded; the kernels themselves ran in stage 2.
        os.environ["MEGALODON_KERNELS"] = "torch"
        # What is compiled for a CPU tells nothing of a card.
        torch.compiler.set_stance("force_eager")
    main(stage)
