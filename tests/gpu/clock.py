"""Times of calls on a card, and the card's own ceilings."""

import os
import statistics
from typing import NamedTuple

import torch


class Ceilings(NamedTuple):
    """What the card does at best: bytes/s of a copy, read and written; bf16 flop/s."""

    bandwidth: float
    flops: float

    def floor(self, size, flops):
        """The seconds that so many bytes and flops take at least."""
        return max(size / self.bandwidth, flops / self.flops)


def ceilings(stage):
    """Measured; in a rehearsal, which has no clock, None."""
    small = stage.rehearse
    size, side = (1 << 16, 64) if small else (1 << 30, 8192)
    source = torch.ones(size, dtype=torch.int8, device=stage.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=stage.device, dtype=torch.bfloat16)
    copying = seconds(stage, lambda: target.copy_(source))
    multiplying = seconds(stage, lambda: a @ b)
    if small:
        return None
    return Ceilings(2 * size / copying, 2 * side**3 / multiplying)


def seconds(stage, function, spent=0.25):
    """The median time of a call between two events, with the caches overwritten before it.

    A rehearsal calls it once and has no time to tell: None.
    """
    function()
    if stage.rehearse:
        return None
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    function()
    times = []
    while len(times) < 5 or (sum(times) < spent and len(times) < 100):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def kernel_seconds(stage, function, calls=5):
    """Device seconds of each kernel in a call, by the profiler; none in a rehearsal."""
    activity = torch.profiler.ProfilerActivity
    function()
    with torch.profiler.profile(
        activities=[activity.CPU if stage.rehearse else activity.CUDA]
    ) as p:
        for _ in range(calls):
            function()
        if not stage.rehearse:
            torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / calls / 1e6 for event in p.key_averages()}
    return {name: time for name, time in times.items() if time > 0}


def card(stage):
    """The card and the versions, for the rows."""
    import triton

    name = "none" if stage.rehearse else torch.cuda.get_device_name()
    return {"card": name, "torch": torch.__version__, "triton": triton.__version__} | {
        "commit": os.environ.get("MEGALODON_COMMIT", "")
    }
