"""Fine-tuning: the Trainer, gradient checkpointing, labels, autocast, dropout, fresh weights."""

import math

import pytest
import torch
from hf_models import SHAPES, build

from comparing import error
from megalodon_mcore.hf import MegalodonConfig, MegalodonForCausalLM, block_megalodon

# transformers 5.23 has a newer name for gradient checkpointing, which 5.12 lacks.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    model = build(name, dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1).train()
    tokens = torch.randint(64, (2, 75))
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    inputs = dict(input_ids=tokens, labels=tokens, attention_mask=mask)
    torch.manual_seed(1)
    loss, expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    calls = []
    hook = model.model.layers[0].wz.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    again, actual = gradients(model, **inputs)
    hook.remove()
    assert len(calls) == 2 and torch.equal(loss, again)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_loss_is_of_the_next_tokens_and_padding_to_the_right_is_harmless():
    model = build()
    tokens = torch.randint(64, (2, 30))
    labels = tokens.clone()
    labels[0, 20:] = -100
    loss, expected = gradients(model, input_ids=tokens, labels=labels)
    with torch.no_grad():
        logits = model(tokens).logits.log_softmax(-1)
    nll = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    picked = torch.cat([nll[0, :19], nll[1]])
    assert error(loss, picked.mean().double()) < 1e-6
    scrambled = tokens.clone()
    scrambled[0, 20:] = torch.randint(64, (10,))
    _, actual = gradients(model, input_ids=scrambled, labels=labels)
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b.double()) < 1e-5


def test_trainer_lowers_the_loss(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model = build(vocab_size=16)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(16, (40,), generator=generator) for _ in range(4)]
    data = [dict(input_ids=row, labels=row) for row in rows]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[0] > losses[2]
    assert math.isclose(before, losses[0], rel_tol=1e-4)
    assert trainer.evaluate()["eval_loss"] < before


def test_autocast_leaves_averages_and_statistics_in_float32():
    model = build().train()
    tokens = torch.randint(64, (2, 100))
    types = {}
    for name in ("cema", "timestep_norm", "wz"):
        module = getattr(model.model.layers[0], name)
        module.register_forward_hook(
            lambda _, inputs, output, name=name: types.update(
                {name: (output[0] if isinstance(output, tuple) else output).dtype}
            )
        )
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(tokens).logits
    assert types == {"cema": torch.float32, "timestep_norm": torch.float32, "wz": torch.bfloat16}
    assert error(actual, expected.double()) < 0.05


def test_each_dropout_is_where_the_equations_have_it(monkeypatch):
    functional, seen = torch.nn.functional, []
    attention = functional.scaled_dot_product_attention

    def dropout(x, p, training):
        seen.append((p, x.shape[-1]))
        return x

    def scaled_dot_product_attention(*arguments, dropout_p, **options):
        seen.append(("attention", dropout_p))
        return attention(*arguments, dropout_p=0.0, **options)

    monkeypatch.setattr(block_megalodon, "kernels", None)
    monkeypatch.setattr(functional, "dropout", dropout)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", scaled_dot_product_attention)
    model = build(dropout=0.1, hidden_dropout=0.2, attention_dropout=0.3).train()
    model(torch.randint(64, (2, 5)))
    width, value, hidden = 32, 24, 48
    block = [(0.2, width), ("attention", 0.3), (0.2, value), (0.1, width)]
    block += [(0.2, hidden), (0.1, width)]
    assert seen == [(0.1, width), *block, *block]
    seen.clear()
    model.eval()(torch.randint(64, (2, 5)))
    assert ("attention", 0.0) in seen and ("attention", 0.3) not in seen


def test_fresh_weights_start_as_the_released_ones_do():
    torch.manual_seed(0)
    config = MegalodonConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, intermediate_size=300,
        rescale_nffn=True, swiglu=True,
    )  # fmt: skip
    model = MegalodonForCausalLM(config)
    layer = model.model.layers[1]
    for weight, std in (
        (model.lm_head.weight, 1 / 16),
        (model.model.embed_tokens.weight, 1 / 16),
        (layer.wz.weight, 1 / math.sqrt(3 * 256)),
        (layer.wh2.weight, 1 / math.sqrt(3 * 512)),
        (layer.ffn.w2.weight, 1 / math.sqrt(3 * 300)),
        (layer.cema.alpha, 0.2),
        (layer.cema.delta, 0.2),
        (layer.cema.gamma[..., 0], 1.0),
    ):
        assert math.isclose(weight.std().item(), std, rel_tol=0.06)
    assert model.lm_head.weight.abs().max() <= 3 / 16
    assert (layer.cema.gamma[..., 1] == 0).all() and (layer.wz.bias == 0).all()
    frequencies = layer.cema.theta.sigmoid().flatten().sort(descending=True).values
    expected = torch.exp(-math.log(256) / 256 * torch.arange(1, 257))
    assert torch.allclose(frequencies, expected, rtol=1e-4)
    assert not torch.equal(layer.cema.theta, model.model.layers[0].cema.theta)
    assert torch.allclose(layer.ffn.rescale.weight, torch.tensor(0.05))
    for norm in (layer.timestep_norm, layer.cema_norm, layer.ffn_norm, model.model.norm):
        assert (norm.weight == 0).all()


@pytest.mark.parametrize(
    ("mode", "largest", "std"),
    [
        ("bert", 0.2, 0.02),
        ("xavier", math.sqrt(6 / 320), math.sqrt(2 / 320)),
        ("gaussian", 3, 0.99),
    ],
)
def test_fresh_weights_follow_the_init_mode(mode, largest, std):
    config = MegalodonConfig(
        vocab_size=50, hidden_size=256, num_hidden_layers=1, megalodon_init_mode=mode
    )
    weight = MegalodonForCausalLM(config).model.layers[0].wz.weight
    assert weight.shape == (64, 256) and weight.abs().max() <= largest
    assert math.isclose(weight.std().item(), std, rel_tol=0.04)


def test_a_cache_is_refused_where_blocks_run_twice():
    model = build().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Gradient checkpointing .*; leave out use_cache"):
        model(torch.randint(64, (1, 5)), use_cache=True)


def test_resized_embeddings_keep_their_rows():
    model = build("tied-scaled-four-heads")
    before = model.get_input_embeddings().weight[:50].clone()
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 1]])).logits.shape == (1, 2, 70)
    assert torch.equal(model.lm_head.weight[:50], before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chunk_size", 0, "chunk_size is 0; it takes a positive integer."),
        ("cema_ndim", 10**30, "cema_ndim is 10*; it takes less than"),
        ("pad_token_id", [[]], r"pad_token_id is \[\[\]\]; it takes an integer or None."),
        ("z_dim", 6, "z_dim is 6; it takes a multiple of 4"),
        ("value_dim", 5, "value_dim is 5; it takes a multiple of 2"),
        ("norm_num_groups", 3, "norm_num_groups is 3; it takes a divisor of hidden_size"),
        ("rope_theta", 0.0, "rope_theta is 0.0; it takes a positive number."),
        ("megalodon_init_mode", "zero", "megalodon_init_mode is 'zero'; it takes he, bert"),
        ("dropout", 1.0, "dropout is 1.0; it takes a number from 0 up to below 1."),
    ],
)
def test_configuration_names_what_does_not_fit(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MegalodonConfig(hidden_size=32, num_attention_heads=2, **{field: value})


def test_configuration_derives_what_is_left_out():
    config = MegalodonConfig(hidden_size=4096)
    assert (config.z_dim, config.value_dim, config.norm_num_groups) == (1024, 8192, 64)
