"""Layers that predict further tokens against the straight-line float64 implementation."""

import pytest
import torch
from megalodon_mcore.kernels.segments import Segments
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch.nn.functional import cross_entropy

import straight_line
from building import build, build_hybrid, randomize
from comparing import error

TOLERANCE = 1e-5
BOUNDS = (0, 1, 2, 20, 33, 41)
SCALE = 0.1  # Megatron's --mtp-loss-scaling-factor


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    """Megatron's, which has the number of depths that it met first."""
    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {})


def losses_of(logits, labels):
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_the_loss_and_every_gradient_follow_the_equations(megatron, depths, bounds):
    model, config = build_hybrid("MM" + "/M" * depths, own=dict(chunk_size=16))
    randomize(model)
    batch, length = (2, 37) if bounds is None else (1, 41)
    tokens, labels = torch.randint(64, (2, batch, length))
    packed, segments = None, Segments.of_rows(length, batch)
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(
            *("thd", cu_seqlens, cu_seqlens), max_seqlen_q=length, max_seqlen_kv=length
        )
        segments = Segments.of_documents([bounds])
    positions = torch.arange(length).expand(batch, -1)
    mask = torch.ones(batch, length)
    losses = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed)
    losses.mean().backward()

    p = {n: z.detach().double().requires_grad_() for n, z in model.named_parameters()}
    hidden_states = straight_line.last_hidden_states(tokens, p, config, "MM", 1, 1, 2, segments)
    logits = (hidden_states @ p["output_layer.weight"].T).transpose(0, 1)
    wanted = losses_of(logits, labels).mean()
    for logits in straight_line.further_predictions(
        tokens, hidden_states, p, config, depths, segments
    ):
        labels, mask = (straight_line.one_later(z, segments) for z in (labels, mask))
        wanted = wanted + SCALE / depths * (losses_of(logits, labels) * mask).sum() / mask.sum()
    wanted.backward()
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, p[name].grad) < TOLERANCE, name


def test_a_gpt_model_predicts_as_a_hybrid_one(megatron):
    """Parameters' names, and every bit of the loss."""
    options = dict(heads=2, normalization="RMSNorm", swiglu=True, mtp_num_layers=1)
    gpt, _ = build(own=dict(chunk_size=16), **options)
    hybrid, _ = build_hybrid("MM/M", own=dict(chunk_size=16), heads=2)
    randomize(gpt)
    hybrid.load_state_dict(gpt.state_dict())
    tokens, labels = torch.randint(64, (2, 2, 37))
    positions = torch.arange(37).expand(2, -1)
    for model in (gpt, hybrid):
        model(tokens, positions, None, labels=labels).sum().backward()
    for (name, ours), theirs in zip(hybrid.named_parameters(), gpt.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
