"""What a layer's collectives send in processes of their own, against what a plan measures."""

from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from building import transformer_config
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.layers.block import MegalodonLayer, MegalodonLayerSubmodules
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.measure import Measured, SentBytes, measure_plan

HEADS, HIDDEN = 4, 32
SIZE = MegalodonConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    num_heads=HEADS,
    ffn_hidden_size=48,
    swiglu=True,
    chunk_size=16,
    z_dim=16,
    value_dim=64,
    cema_ndim=4,
    norm_num_groups=4,
    vocab_size=64,
)
PLAIN = ParallelLayout(seq_length=64, micro_batch_size=2, bf16=False)
TENSOR = replace(PLAIN, tp=2)
CONTEXT = replace(PLAIN, cp=4)
BOTH = replace(PLAIN, tp=2, cp=4)


@dataclass(frozen=True)
class Layer:
    """A Megalodon layer of SIZE, or Megatron's GPT layer of the same width."""

    layout: ParallelLayout
    gpt: bool = False
    bounds: tuple[int, ...] | None = None
    """Where documents start in the one row, and its length."""


def count(layer: Layer) -> Measured:
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
            config, submodules, SIZE, layout.order, Documents(), pg_collection=groups
        )
    shape = (layout.residual_length, layout.micro_batch_size, HIDDEN)
    x = torch.randn(*shape, requires_grad=True)
    packed = None
    if layer.bounds is not None:
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(layer.bounds))
    with SentBytes() as forward:
        y = block(x, attention_mask=None, packed_seq_params=packed)[0]
    with SentBytes() as backward:
        y.sum().backward()
    return Measured(
        forward=forward.sent,
        backward=backward.sent,
        forward_calls=forward.calls,
        backward_calls=backward.calls,
    )


def counts(workers, layer: Layer) -> list[Measured]:
    """Every rank's."""
    return workers.run(layer.layout.tp * layer.layout.cp, count, layer)


def over(sent, group: str) -> int:
    return sum(size for (_, where), size in sent.items() if where == group)


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
def test_a_layer_sends_what_a_plan_measures(workers, layout):
    plan = measure_plan(SIZE, layout)
    real = counts(workers, Layer(layout))[plan.cp_rank * layout.tp]
    for name in ("forward", "backward", "forward_calls", "backward_calls"):
        assert getattr(plan.layers["M"], name) == getattr(real, name)


def test_context_parallel_states_do_not_grow_with_the_length(workers):
    """Whole chunks on every rank, so that no keys or values travel."""
    short, long = (
        counts(workers, Layer(replace(CONTEXT, seq_length=length))) for length in (64, 1024)
    )
    assert short == long
    # One all-gather of summaries per recurrence, and its reverse.
    assert short[0].forward_calls == {("all-gather", "CP"): 2}
    assert short[0].backward_calls == {("reduce-scatter", "CP"): 2}


@pytest.mark.parametrize(("order", "states"), [("contiguous", 1), ("zigzag", 2)])
def test_documents_add_no_states_to_the_traffic(workers, order, states):
    """At most the first and the last segment of each part that a rank has are of a cut document."""
    layout = replace(CONTEXT, seq_length=320, micro_batch_size=1, order=order)
    ranks = [
        counts(workers, Layer(layout, bounds=bounds))
        for bounds in (None, tuple(range(0, 321, 64)), tuple(range(0, 321, 5)), (0, 7, 313, 320))
    ]
    # TimestepNorm's means and variances in float64, CEMA's complex states, to three other ranks.
    state = 2 * SIZE.norm_num_groups * 8 + HIDDEN * SIZE.cema_ndim * 8
    for sent in ranks:
        assert sent[0].forward["all-gather", "CP"] <= 3 * states * state
    assert ranks[0][0].forward["all-gather", "CP"] == 3 * states * state
    # Where every document ends with a rank's part, nothing is sent.
    apart = counts(workers, Layer(layout, bounds=tuple(range(0, 321, 40))))[0]
    assert not apart.forward and not apart.backward


def test_tensor_parallelism_sends_one_hidden_state_gather_more_than_gpt(workers):
    layout = replace(TENSOR, seq_length=512)
    ours, gpt = (counts(workers, Layer(layout, gpt=gpt))[0] for gpt in (False, True))
    unit = 512 * 2 * HIDDEN * 4 // 2
    assert over(gpt.forward, "TP") + over(gpt.backward, "TP") == 10 * unit
    # The means and variances of TimestepNorm, and a gradient, are all that comes on top.
    rest = over(ours.forward, "TP") + over(ours.backward, "TP") - 11 * unit
    assert 0 < rest < unit / 100
