"""Megalodon's own values: what is derived, what is refused, and which source of a value wins."""

import dataclasses
import logging
from argparse import Namespace

import pytest

from building import transformer_config
from megalodon_mcore.config import (
    CONFIG_VARIABLE,
    INIT_MODES,
    SIZES,
    MegalodonConfig,
    config_from_environment,
    parse_config,
)
from megalodon_mcore.spec import ARGUMENT_PREFIX, MegalodonSpec, values_in_arguments

FIELDS = [field.name for field in dataclasses.fields(MegalodonConfig)]


def message_of(call, *arguments) -> str:
    with pytest.raises(ValueError) as raised:
        call(*arguments)
    return str(raised.value)


@pytest.mark.parametrize(
    ("hidden_size", "z_dim", "value_dim", "groups"),
    [
        (8, 2, 16, 1),
        (48, 12, 96, 1),
        (64, 16, 128, 2),
        (1024, 256, 2048, 32),
        (4096, 1024, 8192, 64),
    ],
)
def test_widths_follow_from_the_hidden_size(hidden_size, z_dim, value_dim, groups):
    resolved = MegalodonConfig().resolve(hidden_size, 1)
    assert (resolved.z_dim, resolved.value_dim) == (z_dim, value_dim)
    assert resolved.norm_num_groups == groups
    assert (resolved.chunk_size, resolved.cema_ndim, resolved.hidden_dropout) == (2048, 16, 0.0)
    assert (resolved.rescale_nffn, resolved.scale_embedding) == (False, False)
    assert resolved.init_mode == "he"


def test_given_widths_are_kept():
    own = MegalodonConfig(num_heads=3, z_dim=6, value_dim=9, norm_num_groups=5)
    resolved = own.resolve(hidden_size=40, num_attention_heads=3)
    assert dataclasses.asdict(resolved) == dataclasses.asdict(own)


@pytest.mark.parametrize("field", ["chunk_size", "z_dim", "value_dim", "cema_ndim"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field, value):
    message = message_of(MegalodonConfig(**{field: value}).resolve, 32, 1)
    assert message == f"{field} is {value}; it takes a positive integer."


def test_number_of_groups_must_be_positive_and_divide():
    resolve = MegalodonConfig(norm_num_groups=0).resolve
    assert message_of(resolve, 32, 1) == "norm_num_groups is 0; it takes a positive integer."
    resolve = MegalodonConfig(norm_num_groups=5).resolve
    expected = "norm_num_groups is 5, which does not divide --hidden-size 32."
    assert message_of(resolve, 32, 1) == expected


@pytest.mark.parametrize(("field", "value"), [("z_dim", 16), ("value_dim", 64)])
def test_widths_must_be_multiples_of_the_heads(field, value):
    message = message_of(
        MegalodonConfig(**({"z_dim": 18, "value_dim": 66} | {field: value})).resolve, 32, 3
    )
    assert message == (
        f"{field} is {value}, which the 3 heads (--num-attention-heads) do not divide; "
        "take a multiple of 3."
    )


def test_query_heads_must_be_even():
    assert message_of(MegalodonConfig(z_dim=15).resolve, 32, 1) == (
        "z_dim is 15, so a head is 15 wide; RoPE rotates pairs, so take a multiple of 2."
    )
    assert message_of(MegalodonConfig(z_dim=12).resolve, 32, 4) == (
        "z_dim is 12, so a head is 3 wide; RoPE rotates pairs, so take a multiple of 8."
    )


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropout_must_be_a_probability_below_one(value):
    message = message_of(MegalodonConfig(hidden_dropout=value).resolve, 32, 1)
    assert message == f"hidden_dropout is {value}; it takes a number from 0 up to below 1."


def test_init_mode_must_be_known():
    message = message_of(MegalodonConfig(init_mode="zeros").resolve, 32, 1)
    assert message == "init_mode is 'zeros'; it takes he, bert, xavier, gaussian."
    for mode in INIT_MODES:
        assert MegalodonConfig(init_mode=mode).resolve(32, 1).init_mode == mode


def test_override_replaces_known_fields_alone():
    own = MegalodonConfig(chunk_size=16, z_dim=8)
    changed = own.override({"z_dim": 4, "rescale_nffn": True})
    assert changed == MegalodonConfig(chunk_size=16, z_dim=4, rescale_nffn=True)
    assert own == MegalodonConfig(chunk_size=16, z_dim=8)
    expected = f"'chunk' is not a Megalodon value; known: {', '.join(FIELDS)}."
    assert message_of(own.override, {"chunk": 4}) == expected


def test_pairs_become_typed_values():
    pairs = [" chunk_size = 512", "z_dim=64", "hidden_dropout=1e-1", "init_mode=bert"]
    assert parse_config(pairs, "--set") == {
        "chunk_size": 512,
        "z_dim": 64,
        "hidden_dropout": 0.1,
        "init_mode": "bert",
    }
    for text, value in {"true": True, "TRUE": True, "1": True, "False": False, "0": False}.items():
        assert parse_config([f"rescale_nffn={text}"], "--set")["rescale_nffn"] is value
    assert parse_config([], "--set") == {}
    assert parse_config(["z_dim=4", "z_dim=8"], "--set") == {"z_dim": 8}


@pytest.mark.parametrize("pair", ["chunk_size", "chunk=4", "=4", ""])
def test_malformed_pairs_are_named(pair):
    assert message_of(parse_config, [pair], "--set") == (
        f"--set has {pair!r}; it takes NAME=VALUE with NAME one of {', '.join(FIELDS)}."
    )


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("chunk_size", "2k", "an integer"),
        ("z_dim", "64.0", "an integer"),
        ("norm_num_groups", "", "an integer"),
        ("hidden_dropout", "some", "a number"),
        ("scale_embedding", "yes", "true or false"),
    ],
)
def test_values_of_the_wrong_type_are_named(name, text, wanted):
    message = message_of(parse_config, [f"{name}={text}"], "--set")
    assert message == f"--set gives {name}={text!r}; {name} takes {wanted}."


def test_environment_variable(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert config_from_environment() == {}
    monkeypatch.setenv(CONFIG_VARIABLE, "  ")
    assert config_from_environment() == {}
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=512, rescale_nffn=true")
    assert config_from_environment() == {"chunk_size": 512, "rescale_nffn": True}
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=512;rescale_nffn=true")
    message = message_of(config_from_environment)
    assert message.startswith("MEGALODON_CONFIG gives chunk_size='512;rescale_nffn=true'; ")


@pytest.fixture
def arguments(monkeypatch):
    """Stands where Megatron keeps its parsed arguments."""
    from megatron.training import global_vars

    namespace = Namespace(unrelated=7)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", namespace)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    return namespace


def small_spec(**values) -> MegalodonSpec:
    return MegalodonSpec(dataclasses.replace(SIZES["200m"], megalodon=MegalodonConfig(**values)))


def test_arguments_win_over_environment_over_named_size(arguments, monkeypatch):
    sized = small_spec(chunk_size=100, cema_ndim=10, norm_num_groups=2, scale_embedding=True)
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=200,cema_ndim=20")
    arguments.megalodon_chunk_size = 300
    arguments.megalodon_scale_embedding = False
    arguments.megalodon_cema_ndim = None  # what Megatron's parser has where nothing was given
    resolved = sized.resolve(transformer_config())
    assert resolved.chunk_size == 300
    assert resolved.cema_ndim == 20
    assert resolved.norm_num_groups == 2
    assert resolved.scale_embedding is False
    assert resolved.z_dim == 8  # derived: nobody named it


def test_resolved_values_are_written_back_to_the_arguments(arguments):
    resolved = small_spec(chunk_size=100).resolve(transformer_config(hidden_size=64))
    expected = {ARGUMENT_PREFIX + n: v for n, v in dataclasses.asdict(resolved).items()}
    assert vars(arguments) == expected | {"unrelated": 7}
    assert values_in_arguments(arguments) == dataclasses.asdict(resolved)
    again = MegalodonSpec().resolve(transformer_config(hidden_size=64))
    assert again == resolved


def test_wrong_values_leave_the_arguments_alone(arguments, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, "z_dim=7")
    assert "z_dim is 7" in message_of(small_spec().resolve, transformer_config())
    assert vars(arguments) == {"unrelated": 7}


@pytest.mark.parametrize("asked_for", [False, True])
def test_checkpoint_wins_over_named_size_alone_and_where_asked_for(
    arguments, monkeypatch, asked_for
):
    from megatron.training import checkpointing

    stored = Namespace(megalodon_chunk_size=400, megalodon_cema_ndim=40, megalodon_z_dim=4)
    monkeypatch.setattr(checkpointing, "load_args_from_checkpoint", lambda given: (given, stored))
    monkeypatch.setenv(CONFIG_VARIABLE, "cema_ndim=20")
    arguments.use_checkpoint_args = asked_for
    arguments.megalodon_z_dim = 16
    resolved = small_spec(chunk_size=100).resolve(transformer_config())
    assert resolved.chunk_size == (400 if asked_for else 100)
    assert (resolved.cema_ndim, resolved.z_dim) == (20, 16)


def test_a_checkpoints_value_that_another_overrides_is_said(
    arguments, monkeypatch, tmp_path, caplog
):
    from megatron.training import checkpointing

    stored = Namespace(megalodon_chunk_size=8, megalodon_cema_ndim=16)
    monkeypatch.setattr(checkpointing, "load_args_from_checkpoint", lambda given: (given, stored))
    arguments.load, arguments.megalodon_chunk_size = str(tmp_path), 24
    with caplog.at_level(logging.WARNING, logger="megalodon_mcore.spec"):
        MegalodonSpec().resolve(transformer_config())
        assert not caplog.records  # nothing was saved there yet
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
        arguments.load = f"{tmp_path}/"
        MegalodonSpec().resolve(transformer_config())
    assert [record.getMessage() for record in caplog.records] == [
        f"--megalodon-chunk-size is 24; the checkpoint in --load {tmp_path}/ was trained with 8."
    ]


def test_another_padding_of_the_vocabulary_is_said(arguments, monkeypatch, tmp_path, caplog):
    """Losses are those of more or fewer tokens, as with another number of tensor-parallel ranks."""
    from megatron.training import checkpointing

    stored = Namespace(padded_vocab_size=128)
    monkeypatch.setattr(checkpointing, "load_args_from_checkpoint", lambda given: (given, stored))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    arguments.load, arguments.tensor_model_parallel_size = str(tmp_path), 2
    for padded in (128, 256):
        arguments.padded_vocab_size = padded
        arguments.load += "/"
        with caplog.at_level(logging.WARNING, logger="megalodon_mcore.spec"):
            MegalodonSpec().resolve(transformer_config())
    assert [record.getMessage() for record in caplog.records] == [
        f"The vocabulary is padded to 256 tokens; the checkpoint in --load {arguments.load} had "
        "128. Losses differ by the new ones' share in the softmax; with "
        "--make-vocab-size-divisible-by 64 they do not."
    ]


def test_missing_checkpoint_changes_nothing(arguments, monkeypatch):
    from megatron.training import checkpointing

    # Megatron returns the arguments alone where it finds no checkpoint.
    monkeypatch.setattr(checkpointing, "load_args_from_checkpoint", lambda given: given)
    arguments.use_checkpoint_args = True
    assert small_spec(chunk_size=100).resolve(transformer_config()).chunk_size == 100


def test_without_megatron_arguments_the_named_size_counts(monkeypatch):
    from megatron.training import global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert small_spec(chunk_size=100).resolve(transformer_config()).chunk_size == 100


def test_other_megatron_values_than_the_sizes_are_warned_of(monkeypatch, caplog):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    config = transformer_config(num_layers=12, hidden_size=1024, heads=2, ffn=48)
    with caplog.at_level(logging.WARNING, logger="megalodon_mcore.spec"):
        MegalodonSpec(SIZES["200m"]).resolve(config)
        MegalodonSpec().resolve(config)
    assert [record.getMessage() for record in caplog.records] == [
        "--num-attention-heads is 2; the named size has 1.",
        "--ffn-hidden-size is 48; the named size has 2560.",
    ]
