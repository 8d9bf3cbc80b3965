"""Measures one model in Megatron: its size, its speed and memory by length, its loss by position.

`megalodon-mcore compare-measure JOB.json ARGUMENTS`, with the arguments that it is trained with.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon_mcore.whole_file import write_text

GIB = 2**30
TIMED_STEPS = 3


@dataclass(frozen=True)
class Job:
    """What to measure.

    result: the file to write.
    window: the training length.
    memory: GiB that attention's scores may take.
    score_layers, score_heads: of attention that keeps scores [heads, length, length], 0 where none
        does.
    lengths: at which to time a forward and backward pass of one row.
    rows: a NumPy file of int64 [rows, longest + 1], to predict token by token; or None.
    """

    result: str
    window: int
    memory: float
    score_layers: int
    score_heads: int
    lengths: tuple[int, ...] = ()
    rows: str | None = None

    def gib_of_scores(self, length: int, training: bool) -> float:
        """GiB: forward some three float32 copies of one layer's scores are alive; for the backward
        pass every layer keeps its own."""
        one = self.score_heads * length**2 / GIB
        return 12 * one + (8 * self.score_layers * one if training else 0)


def main(argv: list[str]) -> int:
    """Measures and writes the result, which is whole or not there."""
    from megatron.training import training

    from megalodon_mcore import pretraining

    job = Job(**json.loads(Path(argv[0]).read_text()))
    pretraining.set_up(argv[1:])
    args, model = build_model()
    flops = training.num_floating_point_operations(args, 1) / args.seq_length
    found: dict[str, Any] = {
        "parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "flops_per_token": flops,
        "device": f"{torch.cuda.get_device_name()}, {torch.get_num_threads()} threads",
        "speed": [
            time_length(model, job, length, args.padded_vocab_size) for length in job.lengths
        ],
    }
    if job.rows is not None:
        rows = torch.from_numpy(np.load(job.rows))
        found |= losses_by_position(model, job, rows)
    write_text(Path(job.result), json.dumps(found))
    return 0


def build_model() -> tuple[Namespace, torch.nn.Module]:
    """Megatron's arguments from sys.argv and the model they describe, from --load if given."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megalodon_mcore.pretrain_arguments import model_config_from_arguments, parse_arguments

    args = parse_arguments()
    initialize_megatron()
    config = model_config_from_arguments(args)
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    # Without a checkpoint Megatron goes on with first values.
    if args.load and not load_checkpoint([model], None, None)[0]:
        raise ValueError(f"--load is {args.load}, which has no finished checkpoint.")
    return args, model


def token_losses(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Nats of every token but the first of each row, [rows, length] from int64 [rows, length + 1].

    Rows are read without what came before them.
    """
    rows = rows.cuda()
    places = torch.arange(rows.shape[1] - 1, device=rows.device).expand(len(rows), -1)
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return model(inputs, places.contiguous(), None, labels=labels)


def time_length(model: torch.nn.Module, job: Job, length: int, vocabulary: int) -> dict[str, Any]:
    """The median seconds of a forward and backward pass over one row, and the bytes it needs.

    On a GPU these are the most that were allocated beyond the model; on the CPU, what autograd
    keeps for the backward pass. Where they would be too many, `needs` says how many GiB.
    """
    needs = job.gib_of_scores(length, training=True)
    if needs > job.memory:
        return {"length": length, "needs": needs}
    chance = torch.Generator().manual_seed(0)
    row = torch.randint(0, min(256, vocabulary), (1, length + 1), generator=chance)
    model.train()

    def step() -> None:
        model.zero_grad()
        token_losses(model, row).float().mean().backward()
        torch.cuda.synchronize()

    try:
        used = bytes_of_step(model, row, step)
        seconds = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"length": length, "needs": None}
    finally:
        model.zero_grad()
        gc.collect()
    return {"length": length, "seconds": statistics.median(seconds), "bytes": used}


def bytes_of_step(model: torch.nn.Module, row: Tensor, step: Any) -> int:
    """The bytes of one step, as time_length says; also warms up."""
    from megalodon_mcore.planning.measure import KeptBytes

    step()
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    kept = KeptBytes(model)
    with kept:
        token_losses(model, row)
    return kept.peak


@torch.no_grad()
def losses_by_position(model: torch.nn.Module, job: Job, rows: Tensor) -> dict[str, Any]:
    """Mean nats over rows, in bins of positions, of the longest context that memory allows.

    Returns:
        bin: positions of a bin.
        whole: each bin's loss where the model reads a row as one.
        windowed: where it reads each stretch of the training length alone, over the same tokens,
            for all positions of the rows.
        reached: positions that `whole` has.
        needs: GiB that attention would take at the next length, where memory ended it.
    """
    model.eval()
    # Not far from a 64th of the training length, of which it is a part.
    size = next(z for z in range(max(1, job.window // 64), 0, -1) if job.window % z == 0)
    total = rows.shape[1] - 1
    reached, needs = total, None
    while job.gib_of_scores(reached, training=False) > job.memory and reached > job.window:
        reached, needs = reached // 2, job.gib_of_scores(reached, training=False)
    whole = torch.zeros(0)
    while not len(whole):
        try:
            each = [token_losses(model, row[None, : reached + 1]).float().cpu() for row in rows]
            whole = torch.cat(each).double().mean(0)
        except torch.OutOfMemoryError:
            if reached <= job.window:
                raise
            reached //= 2
    cut = rows.unfold(1, job.window + 1, job.window).reshape(-1, job.window + 1)
    windows = torch.cat([token_losses(model, z[None]).float().cpu() for z in cut]).double()
    windowed = windows.view(len(rows), -1).mean(0)
    return {
        "bin": size,
        "whole": whole.view(-1, size).mean(1).tolist(),
        "windowed": windowed.view(-1, size).mean(1).tolist(),
        "reached": reached,
        "needs": needs,
    }
