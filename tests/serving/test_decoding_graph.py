"""A step of single tokens fits a CUDA graph: nothing on the host but its first run decides it."""

import random

import pytest
import torch
from served import CHUNK, check, draw, engine, export, generate, greedy, needs_vllm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = [pytest.mark.vllm, needs_vllm]
# What reads numbers back from a device, or makes a shape of them.
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Recorded(TorchDispatchMode):
    """Operators as they are called, to be called again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert not operator.__name__.startswith(READS), operator
        output = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, output))
        return output

    def replay(self):
        for operator, args, kwargs, output in self.calls:
            again = operator(*args, **kwargs)
            for held, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                    held.copy_(new)


def place(batch, *inputs):
    """What a graph finds anew at a step, by where it is."""
    decoding = batch.decoding
    return [z.data_ptr() for z in (decoding.blocks, decoding.ends, *inputs)]


@pytest.fixture
def plugin():
    from megalodon_mcore.serving import register

    register()


@pytest.fixture
def graphs(monkeypatch, plugin):
    """The recorded steps by the number of their requests; replayed from the second on."""
    from vllm.forward_context import get_forward_context

    from megalodon_mcore.serving.batch import BatchBuilder
    from megalodon_mcore.serving.model import MegalodonForCausalLM

    recorded, runs = {}, []
    forward = MegalodonForCausalLM.forward

    def run(self, input_ids, positions, **others):
        batches = get_forward_context().attn_metadata
        batch = None if batches is None else next(iter(batches.values()))
        if batch is None or batch.pieces is not None:
            return forward(self, input_ids, positions, **others)
        rows, places = len(input_ids), place(batch, input_ids, positions)
        assert batch.decoding.room == CHUNK
        if rows not in recorded:
            with Recorded() as calls:
                output = forward(self, input_ids, positions, **others)
            recorded[rows] = calls, output, places, batch
            return output
        calls, output, before, _ = recorded[rows]
        assert places == before
        calls.replay()
        runs.append(rows)
        return output

    monkeypatch.setattr(MegalodonForCausalLM, "forward", run)
    build = BatchBuilder.build

    def in_graphs(self, *args, **options):
        self.bounded = False
        return build(self, *args, **options)

    monkeypatch.setattr(BatchBuilder, "build", in_graphs)
    return runs


def test_a_step_runs_again_on_the_same_memory(graphs, tmp_path):
    model = export(tmp_path)
    generator = random.Random(0)
    # Requests at other places in their chunks, that end at other times and come again.
    prompts = [draw(generator, n) for n in (1, 5, CHUNK, 2 * CHUNK - 1, 3 * CHUNK + 7, 40)]
    with engine(tmp_path, max_num_seqs=3, max_model_len=1024) as llm:
        lengths = [50, 20, 33, 18, 40, 25]
        parameters = [greedy(n) for n in lengths]
        outputs = generate(llm, prompts, parameters)
    for prompt, output in zip(prompts, outputs, strict=True):
        check(model, prompt, output.outputs[0])
    assert set(graphs) == {1, 2, 3} and len(graphs) > 50


def test_rows_of_nobody_change_nothing(plugin):
    """A graph of more rows than there are requests has vLLM's empty ones behind them."""
    from megalodon_mcore.hf import MegalodonConfig
    from megalodon_mcore.serving.batch import Batch, Decoding
    from megalodon_mcore.serving.block import OWN, PagedTimestepNorm

    config = MegalodonConfig(hidden_size=16, norm_num_groups=2, chunk_size=8)
    norm, x = PagedTimestepNorm(config), torch.randn(4, 16)
    blocks, ends = torch.tensor([3, 1, 0, 0]), torch.tensor([1, 12, 0, 0])
    found = []
    for rows in (2, 4):
        mean, var = (torch.full((4, 2, 2), 0.5, dtype=torch.float64) for _ in range(2))
        batch = Batch(Decoding(config, blocks[:rows], ends[:rows], 8, torch.float32), None)
        y = norm(x[:rows], batch, mean[:, OWN], var[:, OWN])
        assert y.isfinite().all()
        found.append((y[:2], mean[1:], var[1:]))
    for alone, beside in zip(*found, strict=True):
        assert torch.equal(alone, beside)
