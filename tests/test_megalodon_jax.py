"""The whole model against megalodon-jax, an independent implementation from the package index.

Our weights go to it, and its gradients come back, in the layout of released checkpoints.
"""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from building import EPS, build, randomize, swiglu_heads_rescale
from comparing import error
from megalodon_mcore.parameters import number_of_values

jax = pytest.importorskip("jax", reason="megalodon-jax, the judge here, needs jax")
megalodon_jax = pytest.importorskip(
    "megalodon_jax", reason="the judge here is megalodon-jax; pip install megalodon-jax"
)
import equinox as eqx  # noqa: E402 - comes with megalodon-jax
import numpy as np  # noqa: E402
from megalodon_jax.convert import (  # noqa: E402
    export_upstream_state_dict,
    load_upstream_state_dict,
)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time here

VOCABULARY = 64
LAYERS = 2

# Largest differences over the largest expected magnitude. Measured: logits 6e-7, losses 1e-7,
# gradients 6e-6, which is as far as either model's float32 is from float64.
LOGITS_BOUND = 3e-6
LOSS_BOUND = 1e-6
GRADIENT_BOUND = 3e-5

# Each entry: how the model is built, then the tokens' batch and length.
CASES = {
    "one-head-one-group": (dict(own=dict(chunk_size=16)), 3, 45),
    "length-within-a-chunk": (dict(own=dict(chunk_size=64), heads=1), 1, 29),
    "swiglu-two-heads-rescale": (swiglu_heads_rescale(8), 3, 48),
    "tied-scaled-four-heads-many-groups": (
        dict(
            own=dict(chunk_size=13, z_dim=16, norm_num_groups=8, scale_embedding=True),
            heads=4,
            tied=True,
            rotary_base=100_000,
        ),
        1,
        70,
    ),
    "everything-and-long": (
        dict(
            own=dict(
                chunk_size=64, z_dim=16, norm_num_groups=8, rescale_nffn=True, scale_embedding=True
            ),
            heads=4,
            swiglu=True,
            tied=True,
        ),
        3,
        300,
    ),
}

RELEASED_NAMES = {
    "embedding.word_embeddings.": "embed.",
    "decoder.layers.": "layers.",
    "decoder.final_layernorm.": "output.final_norm.",
    "output_layer.": "output.output.",
    "mixer.timestep_norm.": "mega.timenorm.",
    "mixer.cema.": "mega.cema.",
    "mixer.cema_norm.": "mega.rmsnorm.",
    "mixer.linear_z.": "mega.wz.",
    "mixer.linear_v.": "mega.wv.",
    "mixer.linear_r.": "mega.wr.",
    "mixer.linear_proj.bias": "mega.wh1.bias",
    "mixer.query_key.weight": "mega.gamma",
    "mixer.query_key.bias": "mega.beta",
    "feed_forward.norm.": "nffn.norm.",
    "feed_forward.linear_fc1.": "nffn.fc1.",
    "feed_forward.linear_fc2.": "nffn.fc2.",
    "feed_forward.rescale.weight": "nffn.alpha",
}


def released_layout(tensors, swiglu):
    """Our parameters (or their gradients), by our names, as a released checkpoint holds them."""
    released = {}
    for name, tensor in tensors.items():
        for ours, theirs in RELEASED_NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("mixer.linear_proj.weight"):
            hidden_size = tensor.shape[0]
            prefix = name.removesuffix("mixer.linear_proj.weight")
            released[f"{prefix}mega.wh1.weight"] = tensor[:, :hidden_size]
            released[f"{prefix}mega.wh2.weight"] = tensor[:, hidden_size:]
        elif swiglu and name.endswith("nffn.fc1.weight"):
            first, third = tensor.chunk(2)
            released |= {name: first, name.replace("fc1", "fc3"): third}
        else:
            released[name] = tensor
    released.setdefault("output.output.weight", released["embed.weight"])
    return released


def judge_of(own, heads=1, swiglu=False, tied=False, rotary_base=10_000):
    """A freshly started megalodon-jax model of a configuration as `build` takes and returns it."""
    config = megalodon_jax.MegalodonConfig(
        vocab_size=VOCABULARY,
        model_dim=32,
        num_layers=LAYERS,
        num_heads=heads,
        z_dim=own.z_dim,
        value_dim=own.value_dim,
        ffn_hidden_dim=48,
        cema_ndim=own.cema_ndim,
        chunk_size=own.chunk_size,
        norm_num_groups=own.norm_num_groups,
        norm_eps=EPS,
        rope_base=rotary_base,
        swiglu=swiglu,
        rescale_nffn=own.rescale_nffn,
        scale_emb=own.scale_embedding,
        share_emb=tied,
    )
    return megalodon_jax.MegalodonForCausalLM(config, key=jax.random.PRNGKey(0))


def build_pair(options):
    """Our model and the judge, both freshly started, and our resolved configuration."""
    model, own = build(**options, num_layers=LAYERS, vocab_size=VOCABULARY)
    return model, judge_of(**(options | {"own": own})), own


def without_buffers(released):
    """A released state dict without what is no parameter."""
    return {n: v for n, v in released.items() if n != "rope.freqs" and ".prior_" not in n}


def hand_over(parameters, judge):
    """The judge with these parameters (released layout); only constant buffers stay its own."""
    exported = export_upstream_state_dict(judge)
    buffers = {n: exported[n] for n in exported.keys() - without_buffers(exported).keys()}
    return load_upstream_state_dict(judge, parameters | buffers)


@eqx.filter_jit
def judgement(judge, tokens, documents):
    """Its logits, its mean loss of predicting each next token, and that loss's gradients.

    documents: None, or the number of each token's document, from 1 on.
    """

    def loss_of(model):
        return model.compute_loss(tokens, tokens, segment_ids=documents)

    logits, _ = judge(tokens, segment_ids=documents)
    loss, gradients = eqx.filter_value_and_grad(loss_of)(judge)
    return logits, loss, gradients


def relative(actual, expected):
    """The error against what jax returned."""
    return error(actual, torch.tensor(np.asarray(expected)))


PACKED = {"swiglu-two-heads-rescale": (0, 1, 14, 40, 48)}
"""Where documents start in one row, and its length: that of the case."""


@pytest.mark.parametrize(("name", "bounds"), [*((name, None) for name in CASES), *PACKED.items()])
def test_logits_loss_and_every_gradient_agree(megatron, name, bounds):
    options, batch, length = CASES[name]
    swiglu = options.get("swiglu", False)
    model, judge, _ = build_pair(options)
    randomize(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    judge = hand_over(released_layout(parameters, swiglu), judge)
    tokens = torch.randint(VOCABULARY, (1 if bounds else batch, length))
    packed, documents = {}, None
    # The last position of a document has no next token in it: its loss is unused.
    used = torch.ones_like(tokens, dtype=torch.bool)
    used[:, -1] = False
    if bounds:
        starts = torch.zeros_like(tokens)
        starts[:, bounds[:-1]] = 1
        documents = starts.cumsum(1).numpy()
        used[:, [stop - 1 for stop in bounds[1:]]] = False
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed["packed_seq_params"] = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens)
    expected_logits, expected_loss, expected_gradients = judgement(judge, tokens.numpy(), documents)

    logits = model(tokens, None, None, **packed)
    losses = model(tokens, None, None, labels=tokens.roll(-1, dims=1), **packed)
    loss = losses[used].mean()
    loss.backward()
    gradients = released_layout({n: p.grad for n, p in model.named_parameters()}, swiglu)
    expected_gradients = without_buffers(export_upstream_state_dict(expected_gradients))

    assert relative(logits.detach(), expected_logits) < LOGITS_BOUND
    assert relative(loss.detach(), expected_loss) < LOSS_BOUND
    assert gradients.keys() == expected_gradients.keys()
    errors = {n: relative(gradients[n], expected_gradients[n]) for n in gradients}
    assert max(errors.values()) < GRADIENT_BOUND, errors


@pytest.mark.parametrize("name", CASES)
def test_fresh_models_have_the_same_parameters(megatron, name):
    options, _, _ = CASES[name]
    model, judge, own = build_pair(options)
    config = judge.config
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(judge, eqx.is_array)))
    assert number_of_values(own) == count
    assert sum(parameter.numel() for parameter in model.parameters()) == count

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    ours = released_layout(parameters, config.swiglu)
    theirs = without_buffers(export_upstream_state_dict(judge))
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for key, expected in theirs.items():
        # Six standard errors of random values; none at all of constants.
        allowed = 6 * expected.std() / expected.numel() ** 0.5
        assert (ours[key].mean() - expected.mean()).abs() <= allowed, key
        assert (ours[key].std() - expected.std()).abs() <= allowed, key
