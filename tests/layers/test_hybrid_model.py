"""Models of several kinds of layers against the straight-line float64 implementation."""

import math

import pytest
import torch
from megalodon_mcore.kernels.segments import Segments
from megatron.core.packed_seq_params import PackedSeqParams

import straight_line
from building import build, build_hybrid, randomize
from comparing import error

TOLERANCE = 1e-5
BOUNDS = (0, 1, 2, 20, 33, 41)
ATTENTION = dict(heads=4, num_query_groups=2, positions="rope")
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_router_load_balancing_type="none")
SHARED = dict(moe_shared_expert_intermediate_size=24, moe_ffn_hidden_size=40)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("M*M", ATTENTION),
        ("M-*", ATTENTION),
        ("*ME", ATTENTION | EXPERTS),
        ("MM", {}),
        ("MM", EXPERTS),
        ("M*M", ATTENTION | EXPERTS | SHARED | dict(moe_layer_freq=2)),
    ],
)
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_logits_and_every_gradient_follow_the_equations(megatron, pattern, options, bounds):
    model, config = build_hybrid(pattern, own=dict(chunk_size=16), **options)
    randomize(model)
    batch, length = (2, 37) if bounds is None else (1, 41)
    tokens = torch.randint(64, (batch, length))
    packed = segments = None
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(
            *("thd", cu_seqlens, cu_seqlens), max_seqlen_q=length, max_seqlen_kv=length
        )
        segments = Segments.of_documents([bounds])
    logits = model(tokens, None, None, packed_seq_params=packed)
    upstream = torch.randn(logits.shape)
    logits.backward(upstream)

    doubles = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    wanted = straight_line.hybrid_model(
        *(tokens, doubles, config, pattern, options.get("heads", 1)),
        *(options.get("num_query_groups", 1), 2, segments),
    )
    wanted.backward(upstream.double())
    assert error(logits, wanted) < TOLERANCE
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, doubles[name].grad) < TOLERANCE, name


@pytest.mark.parametrize("pattern", ["*M", "M*"])
def test_the_embedding_is_scaled_whatever_the_first_layer(megatron, pattern):
    scaled, _ = build_hybrid(pattern, own=dict(scale_embedding=True), **ATTENTION)
    plain, _ = build_hybrid(pattern, **ATTENTION)
    randomize(scaled)
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        plain.embedding.word_embeddings.weight.mul_(math.sqrt(32))
    tokens = torch.randint(64, (2, 37))
    assert error(scaled(tokens, None, None), plain(tokens, None, None)) < TOLERANCE


def test_a_document_changes_no_bit_of_another(megatron):
    model, _ = build_hybrid("M*-", own=dict(chunk_size=16), **ATTENTION)
    randomize(model)
    cu_seqlens = torch.tensor([0, 9, 48, 70], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=70, max_seqlen_kv=70)
    tokens = torch.randint(64, (1, 70))
    first = model(tokens, None, None, packed_seq_params=packed)
    tokens[:, 9:48] = (tokens[:, 9:48] + 1) % 64
    second = model(tokens, None, None, packed_seq_params=packed)
    assert torch.equal(first[:, :9], second[:, :9]) and torch.equal(first[:, 48:], second[:, 48:])
    assert not torch.equal(first[:, 9:48], second[:, 9:48])


def test_blocks_alone_are_the_gpt_model(megatron):
    """Parameters, their names and their starts, and every bit of the logits."""
    torch.manual_seed(0)
    gpt, _ = build(own=dict(chunk_size=16), heads=2, swiglu=True)
    torch.manual_seed(0)
    hybrid, _ = build_hybrid("MM", own=dict(chunk_size=16), heads=2)
    ours, theirs = dict(hybrid.named_parameters()), dict(gpt.named_parameters())
    assert ours.keys() == theirs.keys()
    randomize(gpt)
    hybrid.load_state_dict(gpt.state_dict())
    tokens = torch.randint(64, (2, 37))
    assert torch.equal(hybrid(tokens, None, None), gpt(tokens, None, None))


@pytest.mark.parametrize(
    ("pattern", "options", "words"),
    [
        ("MM/", {}, "in which the layers after each / differ or are none"),
        ("MDM", {}, "'D'; with Megalodon it takes M (a block)"),
        ("**", ATTENTION, "has no Megalodon block (M)"),
        ("ME", {}, "so it needs --num-experts"),
        ("MM", EXPERTS | dict(moe_layer_freq=[1, 0, 1]), "--moe-layer-freq has 3 numbers and"),
        ("ME", EXPERTS | dict(moe_layer_freq=2), "--moe-layer-freq is 2"),
        ("MM", EXPERTS | dict(moe_grouped_gemm=True), "--moe-grouped-gemm is set"),
        ("MM", dict(heads=4, num_query_groups=2), "--num-query-groups is 2"),
        ("M*", dict(heads=4, positions="learned_absolute"), "--position-embedding-type"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(megatron, pattern, options, words):
    with pytest.raises(ValueError, match="--") as refused:
        build_hybrid(pattern, own=dict(chunk_size=16), **options)
    assert words in str(refused.value)
