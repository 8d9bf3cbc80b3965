"""A block over documents, layouts and sizes drawn at random: values and every gradient.

Every document gives what the block gives for it alone.
"""

import copy
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist

from building import randomize, transformer_config
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.layers.block import MegalodonLayer, MegalodonLayerSubmodules
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.sequence_layout import SEQUENCE_ORDERS, sequence_layout
from megalodon_mcore.parallel.subgroups import subgroup

DRAWS_PER_WORLD = {1: 30, 2: 40, 3: 30, 4: 40, 6: 30, 8: 40}
# Measured over all draws: 5.3e-6 at most, of the largest element of a tensor.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Draw:
    """A block, a batch and a layout; without bounds each row is a document."""

    tp: int
    cp: int
    sequence_parallel: bool
    order: str
    megalodon: MegalodonConfig
    batch: int
    length: int
    bounds: tuple[int, ...] | None


def draw(world_size: int, seed: int) -> Draw:
    """Anything that fits together; lengths seldom are multiples of the chunk size."""
    pick = random.Random(seed)
    tp = pick.choice([size for size in range(1, world_size + 1) if world_size % size == 0])
    cp = world_size // tp
    shared = [heads for heads in (1, 2, 4) if tp % heads == 0]
    heads = pick.choice([*shared, tp, 2 * tp])
    groups = pick.choice([1, 2, 4])
    hidden_size = 4 * tp * groups * pick.choice([1, 2])
    own = dict(
        chunk_size=pick.choice([1, 3, 8, 10, 16, 64]),
        # Narrower heads now and then are near zero, where their norm magnifies rounding.
        z_dim=heads * pick.choice([6, 8]),
        value_dim=heads * tp * pick.choice([1, 3]),
        cema_ndim=pick.choice([1, 3, 16]),
        norm_num_groups=groups,
        rescale_nffn=pick.random() < 0.5,
    )
    sequence_parallel = tp > 1 and pick.random() < 0.6
    order = pick.choice(SEQUENCE_ORDERS)
    megalodon = MegalodonConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_heads=heads,
        ffn_hidden_size=tp * pick.choice([3, 8]),
        swiglu=pick.random() < 0.5,
        **own,
    )
    length = 2 * cp * tp * pick.choice([1, 2, 3, 5])
    bounds = draw_bounds(pick, length, order, cp) if pick.random() < 0.75 else None
    return Draw(
        tp=tp,
        cp=cp,
        sequence_parallel=sequence_parallel,
        order=order,
        megalodon=megalodon,
        batch=pick.choice([1, 2, 3]) if bounds is None else 1,
        length=length,
        bounds=bounds,
    )


def draw_bounds(pick: random.Random, length: int, order: str, cp: int) -> tuple[int, ...]:
    """Where documents start, and the length; now and then all of them have one step."""
    step = 2 * cp if order == "document_zigzag" and cp > 1 else 1
    inner = range(step, length, step)
    count = pick.choice([0, 1, 2, 5, len(inner)])
    return (0, *sorted(pick.sample(inner, min(count, len(inner)))), length)


def errors_of(world_size: int, seeds: range) -> dict[str, tuple[float, str]]:
    """Runs in every rank: the largest error of each draw, with the tensor that has it."""
    draws = sorted(((draw(world_size, seed), seed) for seed in seeds), key=lambda pair: pair[0].tp)
    errors, sizes = {}, None
    for drawn, seed in draws:
        # Groups take longer to make than a draw to compare.
        if sizes != (drawn.tp, drawn.cp):
            parallel_state.destroy_model_parallel()
            sizes = (drawn.tp, drawn.cp)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=drawn.tp, context_parallel_size=drawn.cp
            )
        errors[str(drawn)] = compare(drawn, seed)
    return errors


def compare(drawn: Draw, seed: int) -> tuple[float, str]:
    """Runs the block on each document alone and on all of them in the layout.

    From the same weights, inputs and output gradients.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = copy.copy(groups)
    alone.tp = alone.cp = alone.tp_cp = subgroup((dist.get_rank(),))
    whole = build_block(drawn, alone, tp=1, cp=1)
    randomize(whole, seed)
    share = build_block(drawn, groups, tp=drawn.tp, cp=drawn.cp)
    with torch.no_grad():
        for name, parameter in share.named_parameters():
            parameter.copy_(own_part(drawn, groups, name, whole.get_parameter(name)))

    x, upstream = torch.randn(2, drawn.length, drawn.batch, drawn.megalodon.hidden_size)
    held = positions(drawn, groups)
    expected, expected_x = torch.empty_like(x), torch.empty_like(x)
    for row in range(drawn.batch):
        for start, stop in pairwise(drawn.bounds or (0, drawn.length)):
            document = slice(start, stop), slice(row, row + 1)
            expected[document], expected_x[document] = run(whole, x[document], upstream[document])
    actual, actual_x = run(share, x[held], upstream[held], drawn.bounds)
    errors = {
        "y": error(actual, expected[held], expected),
        "x": error(actual_x, expected_x[held], expected_x),
    }
    for name, parameter in share.named_parameters():
        # What Megatron's finalize_model_grads and DDP do after the backward pass.
        if drawn.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=groups.tp)
        dist.all_reduce(parameter.grad, group=groups.cp)
        gradient = whole.get_parameter(name).grad
        errors[name] = error(parameter.grad, own_part(drawn, groups, name, gradient), gradient)
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def build_block(drawn: Draw, groups: ProcessGroupCollection, tp: int, cp: int) -> MegalodonLayer:
    config = transformer_config(
        hidden_size=drawn.megalodon.hidden_size,
        # Megatron's own check; the block goes by Megalodon's number of heads.
        heads=drawn.tp,
        ffn=drawn.megalodon.ffn_hidden_size,
        swiglu=drawn.megalodon.swiglu,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=drawn.sequence_parallel and tp > 1,
        kv_channels=1,
    )
    return MegalodonLayer(
        config, MegalodonLayerSubmodules(), drawn.megalodon, drawn.order, Documents(), 1, groups
    )


def own_part(
    drawn: Draw, groups: ProcessGroupCollection, name: str, whole: torch.Tensor
) -> torch.Tensor:
    """This rank's part of a whole parameter or gradient, from the equations, not the code."""
    tp, rank = drawn.tp, groups.tp.rank()
    shares = min(tp, drawn.megalodon.num_heads)
    share = rank * shares // tp
    if "query_key" in name:
        return whole.chunk(shares, 1)[share]
    if "linear_z" in name:
        return whole.chunk(shares, 0)[share]
    if any(part in name for part in ("cema.", "linear_v", "linear_r")):
        return whole.chunk(tp, 0)[rank]
    if "linear_proj.weight" in name:
        columns = [drawn.megalodon.hidden_size, drawn.megalodon.value_dim]
        return torch.cat([part.chunk(tp, 1)[rank] for part in whole.split(columns, 1)], 1)
    if "linear_fc1" in name:
        return torch.cat(
            [part.chunk(tp, 0)[rank] for part in whole.chunk(1 + drawn.megalodon.swiglu, 0)]
        )
    return whole.chunk(tp, 1)[rank] if "linear_fc2" in name else whole


def positions(drawn: Draw, groups: ProcessGroupCollection) -> torch.Tensor:
    """The positions of the sequence that this rank holds."""
    layout = sequence_layout(drawn.order, drawn.cp, 1, drawn.bounds or (0, drawn.length))
    spans = layout.spans[groups.cp.rank()]
    held = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    return held.chunk(drawn.tp)[groups.tp.rank()] if drawn.sequence_parallel else held


def run(
    block: MegalodonLayer,
    x: torch.Tensor,
    upstream: torch.Tensor,
    bounds: tuple[int, ...] | None = None,
) -> tuple:
    """Output and input gradient; gradients of parameters add up."""
    x = x.clone().requires_grad_()
    packed = None
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens)
    y, _ = block(x, packed_seq_params=packed)
    y.backward(upstream)
    return y.detach(), x.grad


def error(actual: torch.Tensor, expected: torch.Tensor, whole: torch.Tensor) -> float:
    """The largest difference over the largest element of the whole tensor."""
    assert actual.isfinite().all()
    return ((actual - expected).abs().max() / whole.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize("world_size", DRAWS_PER_WORLD)
def test_drawn_layouts_do_what_one_process_does(workers, world_size):
    seeds = range(1000 * world_size, 1000 * world_size + DRAWS_PER_WORLD[world_size])
    ranks = workers.run(world_size, errors_of, world_size, seeds)
    worst = [max(rank.items(), key=lambda item: item[1]) for rank in ranks]
    drawn, (largest, name) = max(worst, key=lambda item: item[1])
    assert largest < TOLERANCE, f"{name} of {drawn}"


def test_enough_is_drawn():
    draws = [
        draw(size, 1000 * size + n) for size, count in DRAWS_PER_WORLD.items() for n in range(count)
    ]
    assert len({str(drawn) for drawn in draws}) >= 200
    assert {drawn.order for drawn in draws if drawn.cp > 1 and drawn.bounds} == {*SEQUENCE_ORDERS}
    assert any(drawn.tp > drawn.megalodon.num_heads and drawn.sequence_parallel for drawn in draws)
    assert any(
        drawn.cp > 2 and drawn.order == "zigzag" and drawn.tp == 3 for drawn in draws
    ) or any(
        drawn.cp > 1 and drawn.order == "zigzag" and drawn.tp == 3 and drawn.sequence_parallel
        for drawn in draws
    )
