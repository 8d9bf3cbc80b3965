"""What a layer's collectives send, counted as they are called, against the formulas."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from building import transformer_config
from distributed.collectives import Collectives
from megalodon_mcore.accounting import ModelShape
from megalodon_mcore.layers.block import MegalodonLayer, MegalodonLayerSubmodules
from megalodon_mcore.planning import traffic
from megalodon_mcore.planning.layout import ParallelLayout

HEADS, HIDDEN = 4, 32
OWN = dict(chunk_size=16, z_dim=16, value_dim=64, cema_ndim=4, norm_num_groups=4)
SHAPE = ModelShape(
    num_layers=1,
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    ffn_hidden_size=48,
    swiglu=True,
    tied_embeddings=False,
    vocab_size=64,
    megalodon=OWN.resolve(HIDDEN, HEADS),
)
PLAIN = ParallelLayout(seq_length=64, micro_batch_size=2, bf16=False)
TENSOR = replace(PLAIN, tp=2)
CONTEXT = replace(PLAIN, cp=4)
BOTH = replace(PLAIN, tp=2, cp=4)


class Count(NamedTuple):
    """Bytes that a rank sent in a forward and a backward pass, by (collective, kind of group)."""

    forward: dict[tuple[str, str], int]
    backward: dict[tuple[str, str], int]
    calls: int

    def total(self, where: str | None = None, *names: str) -> int:
        """Bytes in both passes, of these collectives (all) in these groups (all)."""
        return sum(
            sent
            for passed in (self.forward, self.backward)
            for (name, group), sent in passed.items()
            if (not names or name in names) and where in (None, group)
        )


@dataclass(frozen=True)
class Layer:
    """A Megalodon layer of SHAPE, or Megatron's GPT layer of the same width."""

    layout: ParallelLayout
    gpt: bool = False


def count(layer: Layer) -> Count:
    """Runs in every rank."""
    layout = layer.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, context_parallel_size=layout.cp
    )
    model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        hidden_size=HIDDEN,
        heads=max(HEADS, layout.tp),
        swiglu=True,
        num_layers=1,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.splits_residual,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if layer.gpt:
        # Norms send nothing; the local one refuses sequence parallelism.
        submodules = replace(
            get_gpt_layer_local_submodules(),
            input_layernorm=IdentityOp,
            pre_mlp_layernorm=IdentityOp,
        )
        block = TransformerLayer(config, submodules, pg_collection=groups)
    else:
        submodules = MegalodonLayerSubmodules()
        block = MegalodonLayer(
            config, submodules, SHAPE.megalodon, 1e4, layout.order, pg_collection=groups
        )
    positions = layout.residual_tokens // layout.micro_batch_size
    x = torch.randn(positions, layout.micro_batch_size, HIDDEN, requires_grad=True)
    with Collectives(groups.tp) as forward:
        y = block(x, attention_mask=None)[0]
    with Collectives(groups.tp) as backward:
        y.sum().backward()
    calls = sum(forward.calls.values()) + sum(backward.calls.values())
    return Count(dict(forward.sent), dict(backward.sent), calls)


def counts(workers, layer: Layer) -> list[Count]:
    """Every rank's."""
    return workers.run(layer.layout.tp * layer.layout.cp, count, layer)


def most(workers, layer: Layer) -> Count:
    """The count of the rank that sends most."""
    return max(counts(workers, layer), key=Count.total)


@pytest.mark.parametrize(
    "layout",
    [
        TENSOR,
        replace(TENSOR, tp=8),
        replace(TENSOR, sequence_parallel=False),
        CONTEXT,
        replace(CONTEXT, order="zigzag"),
        BOTH,
        replace(BOTH, order="zigzag", seq_length=80),
    ],
    ids=["TP 2", "TP 8, 4 heads", "TP 2 without SP", "CP 4", "CP 4 zigzag", "both", "straddling"],
)
def test_a_layer_sends_what_the_formulas_say(workers, layout):
    ranks = counts(workers, Layer(layout))
    planned = traffic.layer_traffic(SHAPE, layout).values()
    # Where chunks straddle, the rank that sends most backward may be another than forward.
    forward = max(sum(rank.forward.values()) for rank in ranks)
    backward = max(sum(rank.backward.values()) for rank in ranks)
    assert forward == sum(sent.forward for sent in planned)
    assert backward == sum(sent.backward for sent in planned)


def test_context_parallel_states_do_not_grow_with_the_length(workers):
    """Whole chunks on every rank, so that no keys or values travel."""
    short, long = (
        most(workers, Layer(replace(CONTEXT, seq_length=length))) for length in (64, 1024)
    )
    assert short == long
    # One all-gather of summaries per recurrence, and its reverse.
    assert short.calls == 4


def test_tensor_parallelism_sends_one_hidden_state_gather_more_than_gpt(workers):
    layout = replace(TENSOR, seq_length=512)
    ours, gpt = (most(workers, Layer(layout, gpt=gpt)) for gpt in (False, True))
    unit = traffic.hidden_state_unit(SHAPE, layout)
    hidden_states = ("allgather_base", "reduce_scatter_base")
    assert gpt.total("tensor") == gpt.total("tensor", *hidden_states) == 10 * unit
    states = traffic.layer_traffic(SHAPE, layout)["TimestepNorm states"]
    assert ours.total(None, *hidden_states) == 11 * unit + states.total
    assert ours.total() - ours.total(None, *hidden_states) < unit / 100
