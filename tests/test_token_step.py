"""Single tokens by TokenStep against the same by the modules: logits, states, and when it is."""

import copy
import io

import pytest
import torch

from building import build, randomize, swiglu_heads_rescale
from megalodon_mcore import streaming
from megalodon_mcore.streaming import StreamingModel
from megalodon_mcore.token_step import TokenStep, can_step

CHUNK = 5
BF16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
OPTIONS = {
    "one-head": dict(own=dict(chunk_size=CHUNK)),
    "swiglu-heads-rescale": swiglu_heads_rescale(CHUNK),
    "tied-scaled": dict(
        own=dict(chunk_size=CHUNK, z_dim=16, scale_embedding=True),
        heads=4,
        tied=True,
        rotary_base=100_000,
    ),
    "dropouts": dict(
        own=dict(chunk_size=CHUNK, hidden_dropout=0.3),
        hidden_dropout=0.2,
        attention_dropout=0.1,
    ),
    "bf16": dict(own=dict(chunk_size=CHUNK, rescale_nffn=True), swiglu=True, **BF16),
    "bf16-fp32-residual": dict(
        own=dict(chunk_size=CHUNK, scale_embedding=True),
        fp32_residual_connection=True,
        **BF16,
    ),
}


def model_of(name="one-head"):
    options = OPTIONS[name]
    model, _ = build(**options)
    randomize(model)
    return model.bfloat16() if options.get("bf16") else model


def by_modules(model):
    """A StreamingModel that never takes a TokenStep."""
    stream = StreamingModel(model)
    stream._token_step = lambda tokens, state: None
    return stream


@pytest.fixture
def counted(monkeypatch):
    """How many tokens a TokenStep took."""
    calls = []
    original = TokenStep.__call__

    def count(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(TokenStep, "__call__", count)
    return calls


def tensors(state):
    for layer in state.layers:
        yield from (*layer.timestep_norm, layer.cema, *layer.attention)
    yield from state.final_norm


def assert_close(actual, expected, bf16=False):
    """Of one another's size: in float32 the two paths round differently, in bf16 once or twice."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.numel():
        scale = expected.abs().max().clamp_min(1e-30)
        worst = ((actual.to(torch.complex128) - expected).abs().max() / scale).item()
        assert worst < (0.04 if bf16 else 2e-5)


@pytest.mark.parametrize("prompt", [0, 1, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_states_are_the_modules(megatron, counted, name, prompt):
    model = model_of(name)
    ours, theirs = StreamingModel(model), by_modules(model)
    tokens = torch.randint(64, (3, prompt + 3 * CHUNK + 1))
    state = other = None
    if prompt:
        _, state = theirs(tokens[:, :prompt])
        other = state
    for position in range(prompt, tokens.shape[1]):
        logits, state = ours(tokens[:, position : position + 1], state)
        wanted, other = theirs(tokens[:, position : position + 1], other)
        assert_close(logits, wanted, "bf16" in name)
        for a, b in zip(tensors(state), tensors(other), strict=True):
            assert_close(a, b, "bf16" in name)
    assert len(counted) == 3 * CHUNK + 1


def test_the_two_take_turns(megatron, counted):
    model = model_of("swiglu-heads-rescale")
    stream, state, pieces = StreamingModel(model), None, []
    tokens = torch.randint(64, (2, 40))
    for piece in tokens.split([1, 1, 9, 1, 1, 1, 6, 1, 1, 17, 1], dim=1):
        logits, state = stream(piece, state, all_logits=True)
        pieces.append(logits)
    with torch.no_grad():
        assert_close(torch.cat(pieces, 1), model(tokens, None, None))
    assert len(counted) == 8


def test_sequences_branch_from_every_state(megatron, counted):
    stream, length = StreamingModel(model_of()), 2 * CHUNK + 2
    first, second = torch.randint(64, (2, 1, length))
    state, states, kept = None, [], []
    for t in range(length):
        _, state = stream(first[:, t : t + 1], state)
        states.append(state)
        kept.append([z.clone() for z in tensors(state)])
    for t in range(length - 1):
        state = states[t]
        for token in second[:, t + 1 :].split(1, dim=1):
            logits, state = stream(token, state)
        mixed = torch.cat([first[:, : t + 1], second[:, t + 1 :]], dim=1)
        assert_close(logits, stream(mixed)[0])
    for state, before in zip(states, kept, strict=True):
        assert all(map(torch.equal, tensors(state), before))


def test_rows_may_be_picked_and_states_copied_and_saved(megatron):
    stream = StreamingModel(model_of())
    tokens = torch.randint(64, (3, 4))
    state = None
    for token in tokens[:, :3].split(1, dim=1):
        _, state = stream(token, state)
    file = io.BytesIO()
    torch.save([*state.layers[0].attention], file)
    rows = torch.tensor([2, 2, 0])
    picked = torch.utils._pytree.tree_map(lambda z: z[rows], state)
    wanted, _ = stream(tokens[rows])
    for branch in (picked, copy.deepcopy(picked)):
        assert_close(stream(tokens[rows, 3:], branch)[0], wanted)
    with pytest.raises(ValueError, match="state.count has shape"):
        stream(tokens[:1, 3:], state)


def test_inference_mode_and_no_grad_share_states(megatron, counted):
    stream, state = StreamingModel(model_of()), None
    tokens = torch.randint(64, (1, 7))
    for t, token in enumerate(tokens.split(1, dim=1)):
        with torch.inference_mode(t % 2 == 0):
            logits, state = stream(token, state)
    assert len(counted) == 7
    assert_close(logits.clone(), stream(tokens)[0])


def test_changed_weights_are_noticed(megatron, counted):
    model = model_of("tied-scaled")
    ours, theirs = StreamingModel(model), by_modules(model)
    state = ours(torch.randint(64, (1, 3)))[1]
    token = torch.tensor([[5]])
    for seed in range(3):
        ours(token, state)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.mul_(1.1 + 0.1 * seed)
            wanted, _ = theirs(token, state)
            assert_close(ours(token, state)[0], wanted)
    # Unnoticed in between, but not at a new sequence.
    model.decoder.layers[0].mixer.cema.delta.data.add_(1.0)
    model.decoder.layers[1].mixer.linear_v.weight = torch.nn.Parameter(
        torch.randn_like(model.decoder.layers[1].mixer.linear_v.weight)
    )
    assert_close(ours(token)[0], theirs(token)[0])
    assert len(counted) == 3 * (1 + len(list(model.parameters()))) + 1


def test_where_it_cannot_step(megatron, counted, monkeypatch):
    token = torch.tensor([[5]])
    model = model_of()
    stream = StreamingModel(model)
    assert can_step(model)
    _, state = stream(token)
    assert len(counted) == 1
    model.train()
    assert not can_step(model)
    stream(token, state)
    model.eval()
    hook = model.decoder.layers[0].mixer.linear_v.register_forward_hook(lambda *a: None)
    assert not can_step(model)
    stream(token)
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_step(model)
    monkeypatch.setattr("megalodon_mcore.token_step.use_triton", lambda *tensors: True)
    assert not can_step(model)
    monkeypatch.undo()
    assert can_step(model)
    emulated, _ = build(**OPTIONS["one-head"], emulated_fp8="tensorwise")
    stream = StreamingModel(emulated)
    assert not can_step(emulated)
    _, state = stream(token)
    stream(token, state)
    assert len(counted) == 1


def test_a_long_stream_takes_no_more_memory(megatron, counted):
    model = model_of()
    stream, state, sizes = StreamingModel(model), None, []
    for t in range(12 * CHUNK):
        _, state = stream(torch.tensor([[t % 64]]), state)
        alive = {
            z.untyped_storage().data_ptr(): z.untyped_storage().nbytes() for z in tensors(state)
        }
        sizes.append(sum(alive.values()))
    assert sizes[CHUNK:] == sizes[:CHUNK] * 11
    assert len(counted) == 12 * CHUNK
    assert isinstance(state, streaming.StreamState)
