"""The planning formulas against the real model: what a rank holds, keeps and sends."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fake_world import KeptBytes, SentBytes, fake_rank
from megalodon_mcore.__main__ import main
from megalodon_mcore.accounting import ModelShape, total_parameters, training_bytes
from megalodon_mcore.config import SIZES, MegalodonConfig, MegalodonSize
from megalodon_mcore.parallel.sequence_layout import context_parallel_layout
from megalodon_mcore.planning import activations, traffic
from megalodon_mcore.planning.layout import ParallelLayout, check_layout
from megalodon_mcore.planning.parameters import count, model_bytes, stage_parameters
from megalodon_mcore.planning.report import memory, plan_lines

PAPER_7B = ModelShape.of(SIZES["7b-paper"], 32_000)
MILLION = ParallelLayout(seq_length=2**20, tp=8, pp=4, cp=32)
"""A 7B model at 1M tokens on 1,024 ranks."""

RECOMPUTE = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def build_stage(size, vocab_size, layout, stage=0, device="cpu"):
    """The GPTModel of a pipeline stage, in the process groups that fake_rank made."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from building import transformer_config
    from megalodon_mcore.spec import MegalodonSpec

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    # TransformerConfig wants a multiple of TP; ranks can share Megalodon's own heads.
    heads = size.num_attention_heads
    own = dataclasses.replace(size.megalodon, num_heads=heads)
    config = transformer_config(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        heads=max(heads, layout.tp),
        ffn=size.ffn_hidden_size,
        swiglu=size.swiglu,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.splits_residual,
        bf16=layout.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        init_model_with_meta_device=device == "meta",
        **RECOMPUTE[layout.recompute],
    )
    size = dataclasses.replace(size, num_attention_heads=max(heads, layout.tp), megalodon=own)
    with torch.device(device):
        model = GPTModel(
            config=config,
            transformer_layer_spec=MegalodonSpec(size, layout.order),
            vocab_size=vocab_size,
            max_sequence_length=layout.seq_length,
            pre_process=stage == 0,
            post_process=stage == layout.pp - 1,
            share_embeddings_and_output_weights=size.tied_embeddings,
            position_embedding_type="none",
        )
    return model.bfloat16() if layout.bf16 else model


# Parameters


@pytest.mark.parametrize("tp_rank", [0, 5])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_7b_on_1024_ranks_has_exactly_the_planned_parameters(stage, tp_rank):
    check_layout(PAPER_7B, MILLION)
    with fake_rank(MILLION, stage=stage, tp_rank=tp_rank, cp_rank=17):
        model = build_stage(SIZES["7b-paper"], 32_000, MILLION, stage, device="meta")
    assert_planned(model, stage_parameters(PAPER_7B, MILLION, stage))
    numbers = {0: 243_369_984, 1: 226_985_984, 3: 243_378_176}
    assert sum(p.numel() for p in model.parameters()) == numbers[stage]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    ("name", "stages", "tp"), [("200m", 2, 8), ("1.3b-pg19", 3, 4), ("1.3b-pg19", 1, 2)]
)
def test_other_sizes_have_exactly_the_planned_parameters(name, stages, tp, sequence_parallel):
    layout = ParallelLayout(2**15, tp=tp, pp=stages, cp=2, sequence_parallel=sequence_parallel)
    shape = ModelShape.of(SIZES[name], 32_000)
    check_layout(shape, layout)
    for stage in range(stages):
        with fake_rank(layout, stage=stage, tp_rank=1):
            model = build_stage(SIZES[name], 32_000, layout, stage, device="meta")
        assert_planned(model, stage_parameters(shape, layout, stage), sequence_parallel)


def assert_planned(model, planned, sequence_parallel=True):
    held = dict(model.named_parameters())
    assert {p.device.type for p in held.values()} == {"meta"}
    assert {name: tuple(p.shape) for name, p in held.items()} == {
        name: p.shape for name, p in planned.items()
    }
    in_float32 = {name for name, p in held.items() if p.dtype == torch.float32}
    assert in_float32 == {name for name, p in planned.items() if p.float32}
    marked = {name for name, p in held.items() if getattr(p, "sequence_parallel", False)}
    assert marked == {name for name, p in planned.items() if p.summed_over_tp and sequence_parallel}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_what_is_not_replicated_adds_up_to_the_model(name, tp, pp):
    shape = ModelShape.of(SIZES[name], 32_000)
    layout = ParallelLayout(2**20, tp=tp, pp=pp)
    check_layout(shape, layout)
    once = sum(
        parameter.numel * tp / parameter.copies
        for stage in range(pp)
        for parameter in stage_parameters(shape, layout, stage).values()
    )
    assert once == total_parameters(shape)


def test_uneven_stages_hold_the_same_layers():
    even = ParallelLayout(2**20, pp=4)
    uneven = dataclasses.replace(even, layers_by_stage=(7, 9, 9, 7))
    check_layout(PAPER_7B, uneven)
    totals = [
        sum(count(stage_parameters(PAPER_7B, layout, stage)) for stage in range(4))
        for layout in (even, uneven)
    ]
    assert totals == [total_parameters(PAPER_7B)] * 2
    assert uneven.stage_layers(PAPER_7B, 0) == 7


# Memory


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_a_single_rank_has_the_bytes_of_accounting(name, bf16):
    shape = ModelShape.of(SIZES[name], 32_000)
    for shards in (True, False):
        layout = ParallelLayout(2**15, bf16=bf16, distributed_optimizer=shards)
        parameters = stage_parameters(shape, layout, 0)
        assert count(parameters) == total_parameters(shape)
        assert model_bytes(parameters, layout) == training_bytes(shape, bf16)


def test_the_distributed_optimizer_shards_its_state_and_nothing_else():
    whole = ParallelLayout(2**20, tp=8, cp=4, dp=4, distributed_optimizer=False)
    parameters = stage_parameters(PAPER_7B, whole, 0)
    before = model_bytes(parameters, whole)
    after = model_bytes(parameters, dataclasses.replace(whole, distributed_optimizer=True))
    assert before["weights"] == after["weights"] and before["gradients"] == after["gradients"]
    assert 0 <= after["optimizer"] - before["optimizer"] / 16 < 24


def test_memory_sums_what_the_first_stage_keeps_of_four_micro_batches():
    terms = memory(PAPER_7B, MILLION, stage=0)
    layer = sum(activations.layer_activations(PAPER_7B, MILLION).values())
    assert terms["activations: layers"] == 4 * 8 * layer
    assert memory(PAPER_7B, MILLION, stage=3)["activations: layers"] == 8 * layer


# Activations and traffic, counted in the real model

TINY = MegalodonSize(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    ffn_hidden_size=96,
    swiglu=True,
    rotary_base=10_000,
    tied_embeddings=False,
    megalodon=MegalodonConfig(chunk_size=64, cema_ndim=4, norm_num_groups=4),
)
PLAIN = dataclasses.replace(
    TINY, swiglu=False, megalodon=dataclasses.replace(TINY.megalodon, rescale_nffn=True)
)
ONE_HEAD = dataclasses.replace(TINY, num_attention_heads=1)

LAYOUTS = {
    "single rank": (TINY, {"micro_batch_size": 2}),
    "single rank, float32": (PLAIN, {"micro_batch_size": 2, "bf16": False}),
    "TP 4 x CP 4, shared heads": (TINY, {"tp": 4, "cp": 4, "micro_batch_size": 2}),
    "TP 2 x CP 2, float32": (PLAIN, {"tp": 2, "cp": 2, "bf16": False}),
    "zigzag": (TINY, {"tp": 2, "cp": 4, "order": "zigzag"}),
    "zigzag without TP": (TINY, {"cp": 4, "order": "zigzag"}),
    "without SP": (ONE_HEAD, {"tp": 4, "cp": 2, "sequence_parallel": False}),
    "TP alone": (ONE_HEAD, {"tp": 4}),
    "selective": (TINY, {"tp": 4, "cp": 2, "recompute": "selective"}),
    "full": (PLAIN, {"tp": 4, "cp": 2, "recompute": "full"}),
    "full, zigzag without SP": (
        TINY,
        {"tp": 2, "cp": 2, "sequence_parallel": False, "order": "zigzag", "recompute": "full"},
    ),
}
VOCABULARY = 64


def run_model(size, layout):
    """Bytes kept after forward, and sent and kept again, of one step of the whole model."""
    with fake_rank(layout, tp_rank=layout.tp - 1, cp_rank=layout.cp // 2):
        model = build_stage(size, VOCABULARY, layout).train()
        tokens = torch.zeros(
            layout.micro_batch_size, layout.seq_length // layout.cp, dtype=torch.int64
        )
        kept, forward, backward = KeptBytes(model), SentBytes(), SentBytes()
        with kept, forward:
            losses = model(tokens, tokens, None, labels=tokens)
        again = KeptBytes(model)
        with again, backward:
            losses.sum().backward()
    return kept.total, forward, backward, again.total


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("MEGALODON_FUSE", "0")


def gate_on_the_cpu(size, layout):
    """Without its Triton kernels or a fused loop the gate keeps SiLU of r too."""
    value_dim = ModelShape.of(size, VOCABULARY).megalodon.value_dim
    return size.num_layers * layout.tokens * value_dim // layout.tp * layout.activation_bytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_sends_and_keeps_what_is_planned(name):
    """Sends exactly; and keeps exactly as much more for each further token."""
    size, options = LAYOUTS[name]
    shape = ModelShape.of(size, VOCABULARY)
    short, long = (ParallelLayout(seq_length=length, **options) for length in (1024, 2048))
    runs = [run_model(size, layout) for layout in (short, long)]

    for layout, (_, forward, backward, _) in zip((short, long), runs, strict=True):
        planned = traffic.stage_traffic(shape, layout, 0).values()
        assert forward.total == sum(sent.forward for sent in planned)
        assert backward.total == sum(sent.backward for sent in planned)

    def planned_bytes(layout):
        edges = sum(activations.edge_activations(shape, layout, 0).values())
        layers = size.num_layers * sum(activations.layer_activations(shape, layout).values())
        is_kept = layout.recompute == "none"
        return edges + layers + (gate_on_the_cpu(size, layout) if is_kept else 0)

    assert runs[1][0] - runs[0][0] == planned_bytes(long) - planned_bytes(short)
    # States, parameters' shifted copies: small, and the same at every length.
    assert 0 <= runs[1][0] - planned_bytes(long) < 2**19


def test_full_recomputation_keeps_a_layer_at_a_time():
    """The layers are run again one after another; what was kept then is counted for all."""
    layouts = [
        ParallelLayout(seq_length=length, tp=4, cp=2, recompute="full") for length in (1024, 2048)
    ]
    shape = ModelShape.of(TINY, VOCABULARY)
    measured, planned = [], []
    for layout in layouts:
        measured.append(run_model(TINY, layout)[3])
        input_kept_before = sum(activations.layer_activations(shape, layout).values())
        once_again = activations.recomputed_bytes(shape, layout) + input_kept_before
        planned.append(TINY.num_layers * once_again + gate_on_the_cpu(TINY, layout))
    assert measured[1] - measured[0] == planned[1] - planned[0]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_straddling_chunks_keep_no_more_than_is_planned(order):
    """Where chunks of 64 straddle ranks of 240 positions and chunks of 60 do not."""
    layout = ParallelLayout(seq_length=960, tp=4, cp=4, order=order, sequence_parallel=False)
    kept, planned = [], []
    for chunk in (60, 64) if order == "contiguous" else (40, 64):
        size = dataclasses.replace(
            TINY, megalodon=dataclasses.replace(TINY.megalodon, chunk_size=chunk)
        )
        shape = ModelShape.of(size, VOCABULARY)
        with fake_rank(layout, tp_rank=1, cp_rank=2):
            model = build_stage(size, VOCABULARY, layout).train()
            tokens = torch.zeros(1, 240, dtype=torch.int64)
            counter = KeptBytes(model)
            with counter:
                model(tokens, tokens, None, labels=tokens)
        kept.append(counter.total)
        layer = activations.layer_activations(shape, layout)
        assert ("straddling chunks" in layer) == (chunk == 64)
        planned.append(TINY.num_layers * layer.get("straddling chunks", 0))
    assert 0 < kept[1] - kept[0] <= planned[1]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("cp", "length", "chunk"),
    [(4, 1024, 96), (8, 1024, 64), (8, 1024, 256), (3, 960, 1000), (8, 8192, 4096)],
)
def test_keys_and_values_travel_as_the_layers_plan_it(order, cp, length, chunk):
    from megalodon_mcore.parallel.chunk_prefix import _plan

    layout = context_parallel_layout(order, cp, length // cp)
    sent, received = traffic.straddling_positions(layout, chunk)
    plans = [_plan(layout, rank, chunk) for rank in range(cp)]
    for rank, plan in enumerate(plans):
        others = [other for other in range(cp) if other != rank]
        assert sent[rank] == sum(plan.send_counts[other] for other in others)
        assert received[rank] == sum(plan.receive_counts[other] for other in others)
    assert any(sent) == (length // cp % chunk != 0 or (order == "zigzag" and chunk > 64))


def test_hidden_states_are_gathered_and_scattered_as_often_as_is_said():
    layout = ParallelLayout(seq_length=512, tp=4, cp=2)
    _, forward, backward, _ = run_model(TINY, layout)
    embedding_and_output = Counter({("_reduce_scatter_base_", 4): 1, ("_allgather_base_", 4): 1})
    layers = Counter({("_allgather_base_", 4): 3, ("_reduce_scatter_base_", 4): 2})
    over_tp = {call: n for call, n in forward.calls.items() if call[1] == 4}
    over_tp.pop(("allreduce_", 4))  # the cross-entropy's
    assert over_tp == embedding_and_output + layers + layers
    backward_layers = Counter({("_allgather_base_", 4): 3, ("_reduce_scatter_base_", 4): 3})
    backward_edges = Counter({("_allgather_base_", 4): 2, ("_reduce_scatter_base_", 4): 1})
    over_tp = {call: n for call, n in backward.calls.items() if call[1] == 4}
    over_tp.pop(("allreduce_", 4))  # gradients of the averages' RMSNorm
    assert over_tp == backward_edges + backward_layers + backward_layers


# What the formulas say


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_states_take_the_same_traffic_at_every_length(order):
    sent = [
        traffic.layer_traffic(PAPER_7B, dataclasses.replace(MILLION, seq_length=n, order=order))
        for n in (2**18, 2**20, 2**22)
    ]
    for name in ("TimestepNorm states", "CEMA states", "gradients of shared parameters"):
        assert len({terms[name] for terms in sent}) == 1 and sent[0][name].total > 0
    assert {terms["keys and values"].total for terms in sent} == {0}
    assert sent[2]["hidden states"].total == 16 * sent[0]["hidden states"].total
    all_to_all = [
        traffic.all_to_all(PAPER_7B, dataclasses.replace(MILLION, seq_length=n)).total
        for n in (2**18, 2**20)
    ]
    assert all_to_all[1] == 4 * all_to_all[0] > 4 * sent[0]["CEMA states"].total


def test_sequence_parallelism_costs_one_gather_more_than_gpts():
    unit = traffic.hidden_state_unit(PAPER_7B, MILLION)
    ours = traffic.layer_traffic(PAPER_7B, MILLION)["hidden states"].total
    assert ours - traffic.gpt_hidden_states(PAPER_7B, MILLION).total == unit
    assert ours == 11 * unit == 11 * 7 * 32_768 * 4096 * 2 // 8


def test_cema_states_of_7b_on_32_ranks():
    sent = traffic.cema_state_traffic(PAPER_7B, MILLION)
    assert sent.forward == sent.backward == 31 * (4096 // 8) * 16 * 8


def test_all_to_all_counts_four_exchanges():
    columns = 2 * 4096 + (2 * 1024 + 8192) + 8192
    sent = traffic.all_to_all(PAPER_7B, MILLION)
    assert sent.forward == sent.backward == 32_768 * columns // 8 * 2 * 31 // 32
    assert traffic.chain_length(MILLION) == 31
    assert traffic.chain_length(dataclasses.replace(MILLION, order="zigzag")) == 63


def test_a_single_rank_sends_nothing():
    layout = ParallelLayout(seq_length=2**15)
    assert all(t.total == 0 for t in traffic.stage_traffic(PAPER_7B, layout, 0).values())
    assert not any(traffic.step_traffic(PAPER_7B, layout, 0).values())


def test_a_step_reduces_gradients_and_gathers_weights():
    layout = ParallelLayout(2**15, tp=2, pp=2, cp=2, dp=4)
    shape = ModelShape.of(SIZES["1.3b-pg19"], 32_000)
    held = model_bytes(stage_parameters(shape, layout, 0), layout)
    sent = traffic.step_traffic(shape, layout, 0)
    assert sent["gradients"] == held["gradients"] * 7 // 8
    assert sent["weights"] == held["weights"] * 7 // 8
    assert sent["tied embedding"] == 4 * 32_000 * 2048 // 2
    layers = 12 * (2 * 2048 + 2048 + 2 * 2048)
    assert sent["norms"] == 4 * layers * 2 // 2
    plain = dataclasses.replace(layout, distributed_optimizer=False)
    assert traffic.step_traffic(shape, plain, 0)["gradients"] == held["gradients"] * 2 * 7 // 8


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_step_sends_what_is_planned_beside_the_padding_of_buffers(distributed_optimizer):
    layout = ParallelLayout(512, tp=2, cp=2, dp=2, distributed_optimizer=distributed_optimizer)
    with fake_rank(layout, cp_rank=1):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads

        model = build_stage(TINY, VOCABULARY, layout).train()
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True
        )
        model = DistributedDataParallel(model.config, ddp_config, model)
        tokens = torch.zeros(1, 256, dtype=torch.int64)
        model(tokens, tokens, None, labels=tokens).sum().backward()
        gradients, weights = SentBytes(), SentBytes()
        with gradients:
            finalize_model_grads([model])
        with weights:
            if distributed_optimizer:
                model.start_param_sync(force_sync=True)
    padding = {b.param_dtype: b.numel - sum(p.numel() for p in b.params) for b in model.buffers}
    planned = traffic.step_traffic(ModelShape.of(TINY, VOCABULARY), layout, 0)
    padded = sum(padding.values()) * 4 * 3 // 4 if distributed_optimizer else 0
    assert gradients.total == planned["gradients"] + planned["norms"] + padded
    if distributed_optimizer:
        padded = (4 * padding[torch.float32] + 2 * padding[torch.bfloat16]) * 3 // 4
        assert weights.total == planned["weights"] + padded


# Layouts that do not fit


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tp": 3}, "--tensor-model-parallel-size is 3 and there are 4 heads; take a divisor"),
        ({"tp": 64}, "64, which does not divide --hidden-size 4104"),
        ({"pp": 5}, "--pipeline-model-parallel-size is 5, which does not divide --num-layers 32"),
        ({"pp": 2, "layers_by_stage": (30, 3)}, r"stages have 30 \+ 3 layers"),
        ({"cp": 3}, "--seq-length is 1048576, which contiguous order .* multiple of 3"),
        ({"cp": 4, "seq_length": 12, "order": "zigzag"}, "zigzag order .* take a multiple of 8"),
        ({"cp": 2, "tp": 4, "seq_length": 12}, "rank has 6 positions, .* take a multiple of 8"),
        ({"dp": 0}, "--dp is 0; it takes a positive integer"),
        ({"order": "spiral"}, "--order is 'spiral'; it takes contiguous, zigzag"),
        ({"recompute": "some"}, "--recompute is 'some'; it takes none, selective, full"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_sentence(options, sentence):
    shape = dataclasses.replace(PAPER_7B, hidden_size=4104) if options.get("tp") == 64 else PAPER_7B
    with pytest.raises(ValueError, match=sentence) as raised:
        check_layout(shape, ParallelLayout(**({"seq_length": 2**20} | options)))
    assert str(raised.value).count(".") == 1 and str(raised.value).endswith(".")


def test_the_vocabulary_must_be_padded():
    shape = ModelShape.of(SIZES["200m"], 50_257)
    with pytest.raises(ValueError, match="does not divide the padded vocabulary 50257"):
        check_layout(shape, ParallelLayout(2**15, tp=2))


# The command and the page


def test_describe_prints_the_plan_of_7b_at_a_million_tokens(capsys):
    command = "describe --preset 7b-paper --tp 8 --pp 4 --cp 32 --dp 1 --seq-length 1048576"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "1,024 ranks = TP 8 x PP 4 x CP 32 x DP 1, with sequence parallelism" in printed
    for stage in (0, 1, 3):
        assert f"{sum(memory(PAPER_7B, MILLION, stage).values()):,} (" in printed
        assert f"{count(stage_parameters(PAPER_7B, MILLION, stage)):,}" in printed
        sent = traffic.stage_traffic(PAPER_7B, MILLION, stage).values()
        assert f"{sum(terms.forward for terms in sent):,} (" in printed
        assert f"{sum(terms.backward for terms in sent):,} (" in printed
        assert f"{sum(traffic.step_traffic(PAPER_7B, MILLION, stage).values()):,} (" in printed
    assert "on one rank" not in printed


def test_describe_takes_every_layout_option(capsys):
    command = (
        "describe --preset 1.3b --dtype float32 --tp 2 --pp 2 --cp 2 --dp 3 --seq-length 8192 "
        "--micro-batch-size 2 --order zigzag --recompute selective --no-sequence-parallel "
        "--no-distributed-optimizer --layers-by-stage 11 13"
    )
    assert main(command.split()) == 0
    layout = ParallelLayout(
        seq_length=8192,
        tp=2,
        pp=2,
        cp=2,
        dp=3,
        micro_batch_size=2,
        order="zigzag",
        recompute="selective",
        sequence_parallel=False,
        distributed_optimizer=False,
        layers_by_stage=(11, 13),
        bf16=False,
    )
    printed = capsys.readouterr().out
    assert "\n".join(plan_lines(ModelShape.of(SIZES["1.3b"], 32_000), layout)) in printed


def test_describe_without_a_layout_prints_one_rank(capsys):
    assert main(["describe", "--preset", "200m"]) == 0
    printed = capsys.readouterr().out
    assert "with Adam, on one rank, activations aside" in printed and "Layout" not in printed


def test_describe_wants_a_length(capsys):
    assert main(["describe", "--preset", "200m", "--tp", "2"]) == 2
    assert "--seq-length is missing" in capsys.readouterr().err


def page_rows():
    """The cells of the page's table of layouts."""
    page = Path(__file__).parents[1] / "examples" / "parallel.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    return [cells for cells in rows if len(cells) == 13 and cells[0] in SIZES]


def test_the_page_has_rows():
    assert {cells[0] for cells in page_rows()} == {"200m", "1.3b", "7b-paper"}


@pytest.mark.parametrize("cells", page_rows(), ids=" ".join)
def test_the_page_says_what_the_formulas_say(cells):
    name, *numbers = cells[:7]
    length, ranks, tp, pp, cp, dp = (int(number.replace(",", "")) for number in numbers)
    shape = ModelShape.of(SIZES[name], 32_000)
    layout = ParallelLayout(length, tp=tp, pp=pp, cp=cp, dp=dp, recompute=cells[7])
    check_layout(shape, layout)
    assert layout.ranks == ranks
    layer = traffic.layer_traffic(shape, layout)
    assert layer["keys and values"].total == 0
    fullest = max(sum(memory(shape, layout, stage).values()) for stage in range(pp))
    once = max(sum(traffic.step_traffic(shape, layout, stage).values()) for stage in range(pp))
    states = layer["TimestepNorm states"].total + layer["CEMA states"].total
    assert cells[8:] == [
        f"{fullest / 2**30:.1f}",
        f"{layer['hidden states'].total / 2**20:,.0f}",
        f"{states / 2**20:,.1f}",
        f"{traffic.all_to_all(shape, layout).total / 2**20:,.0f}",
        f"{once / 2**30:.1f}",
    ]
    assert fullest <= 64 * 2**30


def test_the_pages_formula_counts_a_layers_parameters():
    d, n, z, e, f, heads, tp = 4096, 16, 1024, 8192, 8192, 4, 8
    sharded = 4 * n * d + 2 * d + 2 * (d * e + e) + d * (d + e) + 3 * d * f
    layer = sharded // tp + (d + 5) * z // min(tp, heads) + 6 * d
    assert 8 * layer == count(stage_parameters(PAPER_7B, MILLION, stage=1))


def test_planning_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megalodon_mcore.planning.report, megalodon_mcore.planning.arguments\n"
        "assert not {'torch', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
