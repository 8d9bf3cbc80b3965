"""The model's values: what is derived, what is refused, and which source of a value wins."""

import dataclasses
import logging
from argparse import Namespace

import pytest

from building import transformer_config
from megalodon_mcore.config import (
    ARGUMENT_PREFIX,
    FIELDS,
    INIT_MODES,
    OWN,
    MegalodonConfig,
    config_from,
    config_from_arguments,
    names,
)
from megalodon_mcore.config_sources import (
    CONFIG_VARIABLE,
    parse_pairs,
    settle,
    values_in_arguments,
    values_in_environment,
)
from megalodon_mcore.hf import MegalodonConfig as HuggingFaceConfig
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.spec import MegalodonSpec


def message_of(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def config(**values) -> MegalodonConfig:
    shape = dict(num_layers=2, hidden_size=32, num_heads=1, ffn_hidden_size=48)
    return MegalodonConfig(**(shape | values))


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
    made = config(hidden_size=hidden_size)
    assert (made.z_dim, made.value_dim, made.norm_num_groups) == (z_dim, value_dim, groups)
    assert (made.chunk_size, made.cema_ndim, made.hidden_dropout) == (2048, 16, 0.0)
    assert (made.rescale_nffn, made.scale_embedding) == (False, False)
    assert made.init_mode == "he"


def test_given_widths_are_kept():
    given = dict(num_heads=3, z_dim=6, value_dim=9, norm_num_groups=5)
    made = config(hidden_size=40, **given)
    assert given == {name: getattr(made, name) for name in given}


@pytest.mark.parametrize("field", ["chunk_size", "z_dim", "value_dim", "cema_ndim", "num_layers"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field, value):
    message = message_of(config, **{field: value})
    assert message == f"{field} is {value}; it takes a positive integer."


def test_counts_must_be_numbers_of_a_model():
    assert message_of(config, num_layers=10_001) == "num_layers is 10001; it takes 10000 at most."
    assert message_of(config, chunk_size=2**31).endswith("; it takes less than 2**31.")
    assert message_of(config, swiglu=1) == "swiglu is 1; it takes a value of bool."
    assert message_of(config, z_dim=True) == "z_dim is True; it takes a value of int."
    assert message_of(config, norm_eps=0.0) == "norm_eps is 0.0; it takes a positive number."


def test_number_of_groups_must_be_positive_and_divide():
    message = message_of(config, norm_num_groups=0)
    assert message == "norm_num_groups is 0; it takes a positive integer."
    expected = "norm_num_groups is 5, which does not divide --hidden-size 32."
    assert message_of(config, norm_num_groups=5) == expected


@pytest.mark.parametrize(("field", "value"), [("z_dim", 16), ("value_dim", 64)])
def test_widths_must_be_multiples_of_the_heads(field, value):
    widths = {"z_dim": 18, "value_dim": 66} | {field: value}
    assert message_of(config, num_heads=3, **widths) == (
        f"{field} is {value}, which the 3 heads (--num-attention-heads) do not divide; "
        "take a multiple of 3."
    )


def test_query_heads_must_be_even():
    assert message_of(config, z_dim=15) == (
        "z_dim is 15, so a head is 15 wide; RoPE rotates pairs, so take a multiple of 2."
    )
    assert message_of(config, num_heads=4, z_dim=12) == (
        "z_dim is 12, so a head is 3 wide; RoPE rotates pairs, so take a multiple of 8."
    )


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["hidden_dropout", "dropout", "attention_dropout"])
def test_dropout_must_be_a_probability_below_one(name, value):
    message = message_of(config, **{name: value})
    assert message == f"{name} is {value}; it takes a number from 0 up to below 1."


def test_init_mode_must_be_known():
    message = message_of(config, init_mode="zeros")
    assert message == "init_mode is 'zeros'; it takes he, bert, xavier, gaussian."
    for mode in INIT_MODES:
        assert config(init_mode=mode).init_mode == mode


@pytest.mark.parametrize("form", ["hf", "released", "core"])
def test_a_form_gives_the_configuration_back(form):
    made = config(swiglu=True, tied=True, z_dim=8, vocab_size=77, dropout=0.1, rotary_base=500.0)
    assert config_from(made.named(form), form, "here") == made


def test_so_do_megatrons_arguments():
    made = config(swiglu=True, tied=True, z_dim=8, vocab_size=77, dropout=0.1, rotary_base=500.0)
    arguments = Namespace(**made.named("megatron"), untie_embeddings_and_output_weights=False)
    assert config_from_arguments(arguments, 77, "here") == made


def test_what_a_checkpoint_does_not_say_is_named():
    values = config().named("hf")
    assert message_of(config_from, values | {"z_dim": None}, "hf", "it") == "it does not say z_dim."
    values["num_hidden_layers"] = "two"
    assert message_of(config_from, values, "hf", "it") == (
        "it describes no model: num_layers is 'two'; it takes a value of int."
    )


def test_the_hugging_face_configuration_has_every_value():
    """Its file travels alone, and so says them a second time."""
    theirs = HuggingFaceConfig().to_dict()
    for ours, name in names("hf").items():
        if ours != "init_mode":
            assert name in theirs, ours
            if not isinstance(FIELDS[ours].default, type(dataclasses.MISSING)):
                default = FIELDS[ours].default
                assert default is None or theirs[name] == default, ours


def test_sources_take_precedence_in_one_order(monkeypatch):
    size = config(chunk_size=1, cema_ndim=1, norm_num_groups=1, rescale_nffn=True)
    checkpoint = {"chunk_size": 2, "cema_ndim": 2, "norm_num_groups": 2}
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=4,cema_ndim=4")
    found = settle({"chunk_size": 8}, checkpoint, size)
    assert found == size.own_values() | {"chunk_size": 8, "cema_ndim": 4, "norm_num_groups": 2}
    expected = f"'chunk' is not a Megalodon value; known: {', '.join(OWN)}."
    assert message_of(settle, {"chunk": 4}) == expected


def test_pairs_become_typed_values():
    pairs = [" chunk_size = 512", "z_dim=64", "hidden_dropout=1e-1", "init_mode=bert"]
    assert parse_pairs(pairs, "--set") == {
        "chunk_size": 512,
        "z_dim": 64,
        "hidden_dropout": 0.1,
        "init_mode": "bert",
    }
    for text, value in {"true": True, "TRUE": True, "1": True, "False": False, "0": False}.items():
        assert parse_pairs([f"rescale_nffn={text}"], "--set")["rescale_nffn"] is value
    assert parse_pairs([], "--set") == {}
    assert parse_pairs(["z_dim=4", "z_dim=8"], "--set") == {"z_dim": 8}


@pytest.mark.parametrize("pair", ["chunk_size", "chunk=4", "=4", ""])
def test_malformed_pairs_are_named(pair):
    assert message_of(parse_pairs, [pair], "--set") == (
        f"--set has {pair!r}; it takes NAME=VALUE with NAME one of {', '.join(OWN)}."
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
    message = message_of(parse_pairs, [f"{name}={text}"], "--set")
    assert message == f"--set gives {name}={text!r}; {name} takes {wanted}."


def test_environment_variable(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert values_in_environment() == {}
    monkeypatch.setenv(CONFIG_VARIABLE, "  ")
    assert values_in_environment() == {}
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=512, rescale_nffn=true")
    assert values_in_environment() == {"chunk_size": 512, "rescale_nffn": True}
    monkeypatch.setenv(CONFIG_VARIABLE, "chunk_size=512;rescale_nffn=true")
    message = message_of(values_in_environment)
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
    return MegalodonSpec(config(**values))


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
    resolved = small_spec(chunk_size=100).resolve(transformer_config())
    expected = {ARGUMENT_PREFIX + n: v for n, v in resolved.own_values().items()}
    assert vars(arguments) == expected | {"unrelated": 7}
    assert values_in_arguments(arguments) == resolved.own_values()
    again = MegalodonSpec().resolve(transformer_config())
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
    given = transformer_config(num_layers=12, hidden_size=1024, heads=2, ffn=48)
    with caplog.at_level(logging.WARNING, logger="megalodon_mcore.spec"):
        MegalodonSpec(SIZES["200m"]).resolve(given)
        MegalodonSpec().resolve(given)
    assert [record.getMessage() for record in caplog.records] == [
        "--num-attention-heads is 2; the named size has 1.",
        "--ffn-hidden-size is 48; the named size has 2560.",
    ]
