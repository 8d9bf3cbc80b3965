"""Plans: what a rank of the real model holds, keeps and sends, against what is known otherwise."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from building import LISTED
from megalodon_mcore.__main__ import main
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.describe import growing_bytes, streaming_bytes
from megalodon_mcore.hf import MegalodonConfig as HuggingFaceConfig
from megalodon_mcore.hf import MegalodonForCausalLM
from megalodon_mcore.hf.cache_megalodon import ROWS
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.measure import (
    SentBytes,
    all_reduced,
    measure_plan,
    measure_stage,
    memory,
    model_bytes,
    numbers_of,
    step_traffic,
)
from megalodon_mcore.planning.rank import META, build_stage, fake_rank, meta_as_cuda
from megalodon_mcore.planning.report import plan_lines
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.throughput import training_flops_per_token

PAPER_7B = SIZES["7b-paper"]
MILLION = ParallelLayout(seq_length=2**20, tp=8, pp=4, cp=32)
"""A 7B model at 1M tokens on 1,024 ranks."""

VOCABULARY = 64
TINY = MegalodonConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    ffn_hidden_size=96,
    swiglu=True,
    chunk_size=64,
    cema_ndim=4,
    norm_num_groups=4,
    vocab_size=VOCABULARY,
)
PLAIN = dataclasses.replace(TINY, swiglu=False, rescale_nffn=True)
ONE_HEAD = dataclasses.replace(TINY, num_heads=1)

MIXED = dataclasses.replace(
    TINY,
    num_layers=8,
    layers="MM*M-ME*",
    attention_heads=4,
    attention_groups=2,
    attention_positions="rope",
    num_experts=4,
    shared_expert_size=32,
)

EXPERTS = dataclasses.replace(
    TINY, num_layers=3, layers="MXX", num_experts=4, shared_expert_size=32
)

LAYOUTS = {
    "single rank": (TINY, {"micro_batch_size": 2}),
    "single rank, float32": (PLAIN, {"micro_batch_size": 2, "bf16": False}),
    "TP 4 x CP 4, shared heads": (TINY, {"tp": 4, "cp": 4, "micro_batch_size": 2}),
    "TP 2 x CP 2, float32": (PLAIN, {"tp": 2, "cp": 2, "bf16": False}),
    "zigzag": (TINY, {"tp": 2, "cp": 4, "order": "zigzag"}),
    "without SP": (ONE_HEAD, {"tp": 4, "cp": 2, "sequence_parallel": False}),
    "selective": (TINY, {"tp": 4, "cp": 2, "recompute": "selective"}),
    "full": (PLAIN, {"tp": 4, "cp": 2, "recompute": "full"}),
}


@pytest.fixture(scope="module")
def million():
    return measure_plan(PAPER_7B, MILLION)


# Parameters and their bytes


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("200m", 8, 1), ("1.3b-pg19", 2, 3), ("7b-paper", 2, 2)]
)
def test_what_is_not_replicated_adds_up_to_the_model(name, tp, pp):
    size = SIZES[name]
    layout = ParallelLayout(2**15, tp=tp, pp=pp)
    once = 0
    for stage in range(pp):
        for tp_rank in range(tp):
            with fake_rank(layout, stage, tp_rank):
                model = build_stage(size, layout, stage, "M" * (size.num_layers // pp))
            assert {p.device.type for p in model.parameters()} == {"meta"}
            for path, parameter in model.named_parameters():
                tied_copy = size.tied and pp > 1 and path.startswith("output_layer")
                is_cut = getattr(parameter, "partition_dim", -1) >= 0
                counts = parameter.tensor_model_parallel if is_cut else tp_rank == 0
                once += parameter.numel() if counts and not tied_copy else 0
    assert once == LISTED[name]


def test_ranks_of_a_planned_7b_hold_its_share(million):
    numbers = {stage: measured.numbers.total() for stage, measured in million.stages.items()}
    assert numbers == {0: 243_369_984, 1: 226_985_984, 3: 243_378_176}
    # The page's formula for a layer.
    d, n, z, e, f, heads, tp = 4096, 16, 1024, 8192, 8192, 4, 8
    sharded = 4 * n * d + 2 * d + 2 * (d * e + e) + d * (d + e) + 3 * d * f
    layer = sharded // tp + (d + 5) * z // min(tp, heads) + 6 * d
    assert million.layers["M"].numbers.total() == layer
    # CEMA, three norms and the rank's query/key affine.
    float32 = (4 * n + 2) * d // tp + 5 * d + 4 * z // heads
    assert million.layers["M"].numbers[torch.float32] == float32


def test_adams_state_is_sharded_and_nothing_else():
    whole = ParallelLayout(2**20, cp=4, dp=4, distributed_optimizer=False)
    numbers = Counter({torch.float32: 1600, torch.bfloat16: 16_000})
    before = model_bytes(numbers, whole)
    after = model_bytes(numbers, dataclasses.replace(whole, distributed_optimizer=True))
    assert before == {
        "weights": 4 * 1600 + 2 * 16_000,
        "gradients": 4 * 17_600,
        "optimizer": 8 * 1600 + 12 * 16_000,
    }
    assert after == before | {"optimizer": before["optimizer"] // 16}


# Stages from stages of one and two layers


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_stage_is_its_layers_and_its_ends(recompute):
    options = {"tp": 2, "cp": 2, "recompute": recompute}
    size = dataclasses.replace(TINY, num_layers=7)
    layout = ParallelLayout(1024, pp=3, layers_by_stage=(3, 1, 3), **options)
    plan = measure_plan(size, layout)
    for stage, layers in enumerate(layout.layers_by_stage):
        whole = measure_stage(size, layout, stage, "M" * layers, plan.cp_rank)
        assert whole.plus(plan.layers["M"], 0) == plan.stages[stage]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_stage_of_mixed_layers_is_its_layers_and_its_ends(recompute):
    layout = ParallelLayout(
        512, tp=2, cp=2, dp=2, ep=4, pp=3, layers_by_stage=(4, 1, 3), recompute=recompute
    )
    plan = measure_plan(MIXED, layout)
    assert set(plan.layers) == set("M*-E")
    for stage, layers in enumerate(("MM*M", "-", "ME*")):
        # No model is without a block.
        whole = measure_stage(MIXED, layout, stage, "M" + layers, plan.cp_rank)
        whole = whole.plus(plan.layers["M"], -1)
        if recompute == "full":
            # What else is kept when a layer is run again depends on how many there are.
            again = plan.stages[stage].again.total()
            assert whole.again.total() == pytest.approx(again, rel=0.1)
            whole.again = plan.stages[stage].again
        assert whole == plan.stages[stage]


def test_a_stage_of_blocks_with_experts_is_its_layers_and_its_ends():
    layout = ParallelLayout(512, tp=2, dp=2, ep=2)
    plan = measure_plan(EXPERTS, layout)
    assert set(plan.layers) == set("MX")
    assert measure_stage(EXPERTS, layout, 0, "MXX", plan.cp_rank) == plan.stages[0]
    # The block's own FFN aside, an X is an M and what an E adds to its norm.
    parts = {symbol: layer.numbers.total() for symbol, layer in plan.layers.items()}
    experts = 4 // 2 * 3 * 64 * 96 // 2 + 4 * 64 + 3 * 64 * 32 // 2
    assert parts["X"] == parts["M"] - 3 * 64 * 96 // 2 + experts


def test_a_stage_without_bounds_has_its_part_of_the_layers():
    plan = measure_plan(MIXED, ParallelLayout(512, pp=2))
    held = [measured.numbers.total() for measured in plan.stages.values()]
    layers = {symbol: layer.numbers.total() for symbol, layer in plan.layers.items()}
    ends = VOCABULARY * TINY.hidden_size
    norm = 2 * TINY.hidden_size
    assert held == [
        3 * layers["M"] + layers["*"] + ends,
        layers["-"] + layers["M"] + layers["E"] + layers["*"] + ends + norm,
    ]


def test_memory_counts_the_micro_batches_in_flight(million):
    first, last = (memory(million.stages[s], MILLION, s)["activations"] for s in (0, 3))
    layers = 8 * million.layers["M"].kept.total()
    assert 4 * layers < first < 4 * layers * 1.01
    assert layers < last


# Activations


def page_kept(size, layout):
    """The page's formulas for one layer and for what lies outside the layers."""
    own, tp = size, layout.tp
    a = 2 if layout.bf16 else 4
    t = layout.seq_length // layout.cp * layout.micro_batch_size
    s = layout.residual_length * layout.micro_batch_size
    d = size.hidden_size
    z, e, f = own.z_dim // min(tp, own.num_heads), own.value_dim // tp, size.ffn_hidden_size // tp
    statistics = 12 * s * size.norm_num_groups
    mixer = s * d * a + 3 * t * d * a + statistics
    attention = (z + (2 * z + e) + e + 2 * e) * t * a
    ffn = 2 * s * d * a + (3 if size.swiglu else 2) * f * t * a
    ffn += s * d * a if own.rescale_nffn else 0
    if layout.recompute == "full":
        layer = s * d * a
    else:
        if layout.recompute == "selective":
            attention, ffn = (z + 2 * e) * t * a, s * d * a
        layer = mixer + attention + (d // tp + e) * t * a + ffn
    ends = (8 + (tp > 1)) * t + 2 * s * d * a + statistics + 4 * t * VOCABULARY // tp + 9 * t
    return layer, ends


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_page_says_what_a_further_token_keeps(name):
    """Beside what does not grow: states, and parameters in other forms."""
    size, options = LAYOUTS[name]
    short, long = (ParallelLayout(seq_length=length, **options) for length in (1024, 2048))
    plans = [measure_plan(size, layout) for layout in (short, long)]
    layer, ends = (
        b - a for a, b in zip(page_kept(size, short), page_kept(size, long), strict=True)
    )
    # The kernels keep some statistics and states besides, which of so small a model are more.
    measured = plans[1].layers["M"].kept.total() - plans[0].layers["M"].kept.total()
    assert layer <= measured < 1.1 * layer
    stages = [plan.stages[0].kept.total() for plan in plans]
    assert 2 * measured + ends <= stages[1] - stages[0] < 2 * measured + 1.1 * ends
    assert 0 <= plans[1].layers["M"].kept.total() - page_kept(size, long)[0] < 2**18


def test_recomputing_keeps_a_layers_input_and_then_a_layer():
    layout = ParallelLayout(2**15, tp=2, cp=2, pp=2)
    none, selective, full = (
        measure_plan(TINY, dataclasses.replace(layout, recompute=recompute))
        for recompute in ("none", "selective", "full")
    )
    assert full.layers["M"].kept == {"decoder": 2**13 * 64 * 2}
    assert (
        full.layers["M"].kept.total()
        < selective.layers["M"].kept.total()
        < none.layers["M"].kept.total()
    )
    assert not none.stages[0].again.total()
    again = none.layers["M"].kept.total() - full.layers["M"].kept.total()
    # All but states, which layers share where none is run again.
    assert 0 <= full.stages[0].again.total() - again < 2**12
    # On the last stage the loss's part is gone when the layer comes back.
    assert full.stages[1].again.total() < again


def attention_kept(layout):
    """What a layer of attention keeps in bf16, with RoPE."""
    t, s, d = layout.seq_length // layout.cp, layout.residual_length, MIXED.hidden_size
    heads, groups = (z // layout.tp for z in (MIXED.attention_heads, MIXED.attention_groups))
    width = MIXED.attention_head_dim
    # Of the norm; sines and cosines for queries and for keys.
    kept = 4 * s * d + 8 * s + 4 * 2 * t * width
    # Queries, the kernel's output and its sums.
    kept += 2 * 2 * t * heads * width + 4 * t * heads
    if layout.cp == 1:
        # Keys, and values inside of what the projection gave.
        return kept + 2 * t * groups * width + 2 * t * (heads + 2 * groups) * width
    # Beside a mask each head has its own, of all ranks.
    return kept + 2 * 2 * layout.seq_length * heads * width + 2 * t * layout.seq_length


@pytest.mark.parametrize("cp", [1, 2])
def test_attention_keeps_keys_of_all_ranks_and_no_scores_but_a_mask(cp):
    layout = ParallelLayout(4096, tp=2, cp=cp)
    measured = measure_plan(MIXED, layout).layers["*"].kept.total()
    assert 0 <= measured - attention_kept(layout) < 64


def test_tensor_parallelism_leaves_three_inputs_whole():
    """Normalized input, averages and mixed; all else of a layer is cut, nearly in half."""
    one, two = (measure_plan(TINY, ParallelLayout(2**14, tp=tp)) for tp in (1, 2))
    whole = 3 * 2**14 * 64 * 2
    cut = [plan.layers["M"].kept.total() - whole for plan in (one, two)]
    assert cut[1] == pytest.approx(cut[0] / 2, rel=0.05)


# Traffic


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_states_take_the_same_traffic_at_every_length(order):
    short, long = (
        measure_plan(PAPER_7B, ParallelLayout(length, tp=8, cp=8, order=order)).layers["M"]
        for length in (2**17, 2**19)
    )
    segments = 2 if order == "zigzag" else 1
    assert short.forward["all-gather", "CP"] == 7 * segments * 512 * 16 * 8
    for key in short.forward:
        growth = 1 if "CP" in key[1] else 4
        assert long.forward[key] == growth * short.forward[key]


def test_hidden_states_are_gathered_and_scattered_as_often_as_is_said(million):
    unit = 7 * 32_768 * 4096 * 2 // 8
    layer, kinds = million.layers["M"], (("all-gather", "TP"), ("reduce-scatter", "TP"))
    assert [layer.forward_calls[kind] for kind in kinds] == [3, 2]
    assert [layer.backward_calls[kind] for kind in kinds] == [3, 3]
    sent = sum(way[kind] for way in (layer.forward, layer.backward) for kind in kinds)
    assert sent == 11 * unit
    assert layer.forward["all-gather", "CP"] == 31 * 512 * 16 * 8
    boundary = 32_768 // 8 * 4096 * 2
    both = [(m.forward["send", "PP"], m.backward["send", "PP"]) for m in million.stages.values()]
    assert both == [(boundary, 0), (boundary, boundary), (0, boundary)]


def test_a_single_rank_sends_nothing():
    layout = ParallelLayout(1024)
    measured = measure_plan(TINY, layout).stages[0]
    assert not measured.forward and not measured.backward
    assert not any(step_traffic(measured, layout).values())


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_step_sends_what_megatrons_wrapper_sends(distributed_optimizer):
    """Beside the padding of its buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    layout = ParallelLayout(512, tp=2, cp=2, dp=2, distributed_optimizer=distributed_optimizer)
    with fake_rank(layout, cp_rank=1):
        # One of its collectives knows no meta tensors.
        model = build_stage(TINY, layout, 0, "MM", torch.device("cpu")).train()
        numbers = numbers_of(model)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True
        )
        model = DistributedDataParallel(model.config, ddp_config, model)
        tokens = torch.zeros(1, 256, dtype=torch.int64)
        model(tokens, tokens, None, labels=tokens).sum().backward()
        with SentBytes() as gradients:
            finalize_model_grads([model])
        with SentBytes() as weights:
            if distributed_optimizer:
                model.start_param_sync(force_sync=True)
    padding = {b.param_dtype: b.numel - sum(p.numel() for p in b.params) for b in model.buffers}
    measured = measure_plan(TINY, layout).stages[0]
    assert measured.numbers == numbers
    planned = step_traffic(measured, layout)
    padded = sum(padding.values()) * 4 * 3 // 4 if distributed_optimizer else 0
    assert gradients.sent.total() == planned["gradients"] + planned["norms over TP"] + padded
    if distributed_optimizer:
        padded = (4 * padding[torch.float32] + 2 * padding[torch.bfloat16]) * 3 // 4
        assert weights.sent.total() == planned["weights"] + padded


def test_experts_are_summed_over_the_ranks_that_share_them():
    layout = ParallelLayout(512, tp=2, cp=2, dp=2, ep=2)
    model = dataclasses.replace(MIXED, layers="ME", num_layers=2)
    measured = measure_plan(model, layout).stages[0]
    # SwiGLU's three matrices of each expert, in halves.
    experts = 4 // layout.ep * 3 * 64 * 96 // layout.tp
    assert measured.experts == {torch.bfloat16: experts}
    rest = measured.numbers - measured.experts
    adam = 8 * rest[torch.float32] + 12 * rest[torch.bfloat16]
    assert memory(measured, layout, 0)["optimizer"] == adam // 4 + 12 * experts // 2
    once = step_traffic(measured, layout)
    assert once["gradients"] == 4 * (rest.total() * 3 // 4 + experts // 2)


def test_tokens_go_to_experts_and_back():
    layout = ParallelLayout(512, tp=2, cp=2, dp=2, ep=4)
    layer = measure_plan(MIXED, layout).layers["E"]
    # Two experts a token, three quarters of them elsewhere; and a weight of each.
    routed = 2 * layout.residual_length * 3 // 4
    for way in (layer.forward, layer.backward):
        assert way["all-to-all", "EP"] == routed * (2 * 64 + 1) * 2


def test_a_tied_embedding_is_summed_over_its_two_stages():
    size = dataclasses.replace(TINY, tied=True)
    plan = measure_plan(size, ParallelLayout(1024, tp=2, pp=2))
    gradient = 4 * VOCABULARY // 2 * 64
    for measured in plan.stages.values():
        assert measured.once["tied embedding over PP"] == all_reduced(gradient, 2) == gradient


# Operations


@pytest.mark.parametrize(
    "model", [TINY, PLAIN, MIXED, EXPERTS], ids=["swiglu", "plain", "mixed", "experts in blocks"]
)
def test_products_are_those_that_throughput_counts(model):
    """All of its formula but chunked attention and CEMA, whose portable paths compute more."""
    layout = ParallelLayout(256)
    with fake_rank(layout), meta_as_cuda():
        built = build_stage(model, layout, 0, model.symbols).train()
        tokens = torch.zeros(1, 256, dtype=torch.int64, device=META)
        with FlopCounterMode(display=False) as counter:
            built(tokens, tokens, None, labels=tokens)
    counts = {name: sum(z.values()) for name, z in counter.get_flop_counts().items()}
    products = sum(
        count
        for module, count in counts.items()
        if re.search(r"\.(linear_\w+|output_layer|router)$", module)
    )
    # The counter takes no half of what is causal.
    products += sum(z for name, z in counts.items() if name.endswith("core_attention")) / 2
    counted = training_flops_per_token(model, 256)
    blocks = model.symbols.count("M") + model.symbols.count("X")
    attention = 6 * blocks * (model.z_dim + model.value_dim) * 64 / 2
    ema = 6 * blocks * 6 * 64 * model.cema_ndim
    assert 3 * products / 256 == counted - attention - ema


# The command and the page


def test_describe_takes_every_layout_option(capsys):
    command = (
        "describe --preset 200m --dtype float32 --tp 2 --pp 2 --cp 2 --dp 3 --seq-length 8192 "
        "--micro-batch-size 2 --order zigzag --recompute selective --no-sequence-parallel "
        "--no-distributed-optimizer --layers-by-stage 5 7"
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
        layers_by_stage=(5, 7),
        bf16=False,
    )
    printed = capsys.readouterr().out
    assert "\n".join(plan_lines(SIZES["200m"], layout)) in printed
    assert f"{LISTED['200m']:,}" in printed and "on one rank" not in printed


def test_describe_without_a_layout_prints_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("MEGALODON_CONFIG", "chunk_size=1024,cema_ndim=8")
    assert main(["describe", "--preset", "200m", "--set", "chunk_size=512"]) == 0
    printed = capsys.readouterr().out
    assert "with Adam, on one rank, activations aside" in printed and "Layout" not in printed
    # What is set comes before the environment, and that before the size.
    size = dataclasses.replace(SIZES["200m"], chunk_size=512, cema_ndim=8)
    assert f"{streaming_bytes(size, True)['keys and values']:,}" in printed
    assert f"{12 * 1024 * (4 * 8 + 2):,}" in printed


def test_streaming_state_is_the_caches():
    values = dict(hidden_size=64, vocab_size=8, num_hidden_layers=3, chunk_size=16, cema_ndim=4)
    values |= dict(intermediate_size=96, num_attention_heads=2, swiglu=True)
    model = MegalodonForCausalLM(HuggingFaceConfig(**values))
    with torch.no_grad():
        states = model(torch.zeros(1, 5, dtype=torch.int64), use_cache=True).past_key_values.states
    held = [z for state in states for name, z in state.items() if name in ROWS]
    config = MegalodonConfig(
        num_layers=3, hidden_size=64, ffn_hidden_size=96, num_heads=2, chunk_size=16, cema_ndim=4
    )
    assert sum(streaming_bytes(config, False).values()) == sum(z.nbytes for z in held)


def test_describe_says_what_a_pattern_has(capsys):
    command = (
        "describe --preset 200m --hybrid-layer-pattern MM*M|M*ME --num-attention-heads 8 "
        "--num-query-groups 2 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 512"
    )
    layout = "--seq-length 4096 --dp 4 --ep 4"
    assert main([*command.split(), *layout.split()]) == 0
    printed = capsys.readouterr().out
    config = dataclasses.replace(
        SIZES["200m"],
        **{"num_layers": 8, "layers": "MM*MM*ME", "attention_heads": 8, "attention_groups": 2},
        **{"num_experts": 8, "experts_per_token": 2, "expert_ffn_size": 512},
    )
    options = {"dp": 4, "ep": 4, "pp": 2, "layers_by_stage": (4, 4)}
    assert "\n".join(plan_lines(config, ParallelLayout(4096, **options))) in printed
    total, active = (
        int(re.search(rf"{name} +([\d,]+)", printed)[1].replace(",", ""))
        for name in ("total", "active for a token")
    )
    assert total - active == 6 * 2 * 1024 * 512
    assert "rotary_percent" in printed and "shared_expert_size" not in printed

    assert main(command.replace("|", "").split()) == 0
    printed = capsys.readouterr().out
    assert growing_bytes(config, True) == 2 * 2 * 2 * 128 * 2
    assert f"for every token of the context {2 * 2 * 2 * 128 * 2:>28,}" in printed
    own = dataclasses.replace(SIZES["200m"], num_layers=5)
    assert streaming_bytes(config, True) == streaming_bytes(own, True)


def test_describe_prints_no_values_of_layers_that_a_model_lacks(capsys):
    assert main(["describe", "--preset", "200m"]) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"  layers|attention_[hgp]|expert|router|normalization|bias|None", printed)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--hybrid-layer-pattern MGM", "--hybrid-layer-pattern has 'G'; with Megalodon"),
        ("--hybrid-layer-pattern M|*M", "--seq-length is missing"),
        ("--hybrid-layer-pattern MM/M", "--hybrid-layer-pattern is MM/M, of which no layers that"),
        ("--hybrid-layer-pattern M|*M --pp 4", "--pp is 4, but --hybrid-layer-pattern has 2"),
        ("--hybrid-layer-pattern M|M --layers-by-stage 1 1", "is 1 1, but --hybrid-layer-pattern"),
        ("--hybrid-layer-pattern ME", "--hybrid-layer-pattern has E, so it needs --num-experts"),
        ("--num-query-groups 2", "--num-query-groups is 2, which is for attention (*), and the"),
        ("--add-qkv-bias", "--add-qkv-bias is set, which is for attention (*)"),
        ("--moe-layer-freq 2", "--moe-layer-freq is 2, which is for --num-experts in blocks"),
        ("--num-experts 2 --moe-layer-freq 0", "--moe-layer-freq is 0; it takes a positive"),
        ("--num-experts 2 --moe-layer-freq [1]*3", "has 3 numbers and there are 12 Megalodon"),
        (
            "--hybrid-layer-pattern ME --num-experts 2 --moe-router-topk 3",
            "experts_per_token (--moe-router-topk) is 3",
        ),
        ("--ep 2 --seq-length 4096", "--ep is 2, but the model has no experts"),
        (
            "--hybrid-layer-pattern ME --num-experts 4 --ep 2 --seq-length 4096",
            "--ep is 2, which does not divide --dp times --cp, 1; take a divisor",
        ),
        (
            "--hybrid-layer-pattern ME --num-experts 4 --tp 2 --no-sequence-parallel "
            "--seq-length 4096 --set num_heads=2",
            "--no-sequence-parallel is set with --tp 2, but Megatron trains experts",
        ),
    ],
)
def test_layers_that_do_not_fit_are_one_sentence(options, sentence, capsys):
    assert main(["describe", "--preset", "200m", *options.split()]) == 2
    captured = capsys.readouterr()
    (line,) = [one for one in captured.err.splitlines() if one.startswith("megalodon-mcore")]
    assert sentence in line and line.endswith(".") and not captured.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--tp 3", "--tensor-model-parallel-size is 3 and there are 4 heads; take a divisor"),
        ("--tp 8 --set value_dim=8196 num_heads=2", "does not divide value_dim 8196"),
        ("--pp 5", "--num-layers is 32, which --pipeline-model-parallel-size 5 does not divide"),
        ("--pp 2 --layers-by-stage 30 3", "--layers-by-stage is 30 3; for --pp 2 it takes 2"),
        ("--cp 3", "--seq-length is 1048576, which contiguous order"),
        ("--cp 4 --seq-length 12 --order zigzag", "zigzag order with --context-parallel-size 4"),
        ("--cp 2 --tp 4 --seq-length 12", "rank has 6 positions"),
        ("--dp 0", "--dp is 0; it takes a positive integer"),
        ("--tp 2 --vocab-size 50257", "--vocab-size is 50257, which --tp 2 does not divide"),
        ("--vocab-size 0", "--vocab-size is 0; it takes a positive integer"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_sentence(options, sentence, capsys):
    command = f"describe --preset 7b-paper --seq-length 1048576 {options}"
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    (line,) = [one for one in captured.err.splitlines() if one.startswith("megalodon-mcore")]
    assert sentence in line and line.endswith(".") and not captured.out


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
def test_the_page_says_what_describe_measures(cells):
    name, *numbers = cells[:7]
    length, ranks, tp, pp, cp, dp = (int(number.replace(",", "")) for number in numbers)
    size = SIZES[name]
    layout = ParallelLayout(length, tp=tp, pp=pp, cp=cp, dp=dp, recompute=cells[7])
    assert layout.ranks == ranks
    plan = measure_plan(size, layout)
    layer, stages = plan.layers["M"], plan.stages.items()
    sent = {key: layer.forward[key] + layer.backward[key] for key in layer.backward | layer.forward}
    fullest = max(sum(memory(measured, layout, stage).values()) for stage, measured in stages)
    once = max(sum(step_traffic(measured, layout).values()) for _, measured in stages)
    over_tp = sum(
        size for (kind, group), size in sent.items() if group == "TP" and "all-r" not in kind
    )
    own, tokens = size, length // cp
    columns = 2 * size.hidden_size + 2 * own.z_dim + 2 * own.value_dim
    all_to_all = (3 if layout.recompute == "full" else 2) * tokens * columns // tp * 2
    assert cells[8:] == [
        f"{fullest / 2**30:.1f}",
        f"{over_tp / 2**20:,.0f}",
        f"{sum(size for (_, group), size in sent.items() if 'CP' in group) / 2**20:,.1f}",
        f"{all_to_all * (cp - 1) // cp / 2**20:,.0f}",
        f"{once / 2**30:.1f}",
    ]
    assert fullest <= 64 * 2**30
