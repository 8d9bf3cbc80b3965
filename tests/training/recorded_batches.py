"""Writes down what a training program hands to its model, which is not built.

    python recorded_batches.py SCRIPT PORT JOBS

JOBS is JSON, [[FOLDER, RANKS, ARGUMENTS], ...]. For each, SCRIPT runs on the CPU stand-in up to
Megatron's `pretrain`, in whose place its forward_step gets the training data; each rank saves the
calls of its model as FOLDER/RANK.pt. The script `pretrain` is `megalodon-mcore pretrain`. Ranks
meet at PORT.
"""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

MICRO_BATCHES = 6


class Recorder(torch.nn.Module):
    """Keeps what it is called with."""

    vp_stage = None

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(
        self, tokens, position_ids, attention_mask, *, labels, loss_mask, packed_seq_params
    ):
        call = {"tokens": tokens, "position_ids": position_ids, "labels": labels}
        call |= {"attention_mask": attention_mask, "loss_mask": loss_mask}
        # None where documents are not packed.
        self.calls.append(call | (vars(packed_seq_params) if packed_seq_params else {}))
        return torch.zeros_like(loss_mask)


def pretrain_recorder(folder):
    """What stands for Megatron's `pretrain`."""
    from megatron.training import get_args, training
    from megatron.training.initialize import initialize_megatron

    def pretrain(_, datasets_provider, __, forward_step, **options):
        initialize_megatron(get_embedding_ranks=options["get_embedding_ranks"])
        get_args().iteration = 0
        data = training.build_train_valid_test_data_iterators(datasets_provider)[0]
        recorder = Recorder()
        for _ in range(MICRO_BATCHES):
            forward_step(data, recorder)
        torch.save(recorder.calls, Path(folder) / f"{torch.distributed.get_rank()}.pt")

    return pretrain


def cut_documents_on_a_cpu(cu_seqlens, total_tokens, size, rank):
    """Transformer Engine's thd_get_partitioned_indices, by its description: each in zigzag."""
    shares = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        parts = torch.arange(start, end).chunk(2 * size)
        shares += [parts[rank], parts[2 * size - 1 - rank]]
    return torch.cat(shares)


def run(script, folder, arguments, environment):
    os.environ |= environment
    import megatron.training

    megatron.training.pretrain = pretrain_recorder(folder)
    if script == "pretrain":
        from megalodon_mcore import pretraining

        return pretraining.main(arguments)
    from megatron.core import utils

    utils.tex = SimpleNamespace(thd_get_partitioned_indices=cut_documents_on_a_cpu)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    # What was recorded is Megatron's own.
    assert Path(megatron.training.__file__).is_relative_to(Path(script).parent)
    assert "megalodon_mcore.spec" not in sys.modules


def variables(rank, ranks, port):
    """What torchrun would say."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    numbers["MASTER_PORT"] = port
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}


def main(script, port, jobs):
    from megalodon_mcore import cpu

    cpu.install(devices=2)
    if script != "pretrain":
        sys.path[0] = str(Path(script).parent)
    # Before the forks, for it takes ten seconds.
    import megatron.training  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for folder, ranks, arguments in json.loads(jobs):
        processes = [
            fork.Process(target=run, args=(script, folder, arguments, variables(rank, ranks, port)))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
