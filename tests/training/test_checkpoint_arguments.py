"""A checkpoint brings its own arguments: Megatron's and Megalodon's, to training and inference."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from training.runs import DATA, SCHEDULE, generate, save_to, train

# None of these values is a default of Megatron's or Megalodon's.
UNUSUAL_MODEL = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "ffn_hidden_size": 80,
    "seq_length": 40,
    "max_position_embeddings": 40,
    "rotary_base": 5000,
    "megalodon_chunk_size": 12,
    "megalodon_z_dim": 24,
    "megalodon_value_dim": 96,
    "megalodon_cema_ndim": 5,
    "megalodon_norm_num_groups": 4,
    "megalodon_hidden_dropout": 0.05,
    "megalodon_init_mode": "gaussian",
}
UNUSUAL_SWITCHES = ("swiglu", "megalodon_rescale_nffn", "megalodon_scale_embedding")
VOCABULARY = 127
PROMPT = [5, 60, 7]
NUM_TOKENS = 30


def as_arguments() -> list[str]:
    arguments = []
    for name, value in UNUSUAL_MODEL.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments + [f"--{name.replace('_', '-')}" for name in UNUSUAL_SWITCHES]


def arguments_in(checkpoint: Path, iteration: int) -> Namespace:
    """The arguments that a checkpoint holds."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    return load_common_state_dict(str(checkpoint / f"iter_{iteration:07d}"))["args"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six iterations, with a checkpoint after the third and the last."""
    folder = tmp_path_factory.mktemp("trained")
    run = train(
        folder, *as_arguments(), *DATA, *SCHEDULE, "--save", str(folder), "--save-interval", "3"
    )
    return folder, run


def test_a_checkpoint_records_every_value(trained):
    recorded = vars(arguments_in(trained[0], 3))
    assert {name: recorded[name] for name in UNUSUAL_MODEL} == UNUSUAL_MODEL
    assert all(recorded[name] for name in UNUSUAL_SWITCHES)


def test_training_goes_on_with_no_model_argument(trained, tmp_path):
    folder, whole = trained
    resumed = train(
        tmp_path,
        *("--load", str(folder), "--ckpt-step", "3", "--use-checkpoint-args"),
        *(*DATA, *SCHEDULE, *save_to(tmp_path)),
    )
    assert list(resumed.losses) == [4, 5, 6]
    assert resumed.losses == {iteration: whole.losses[iteration] for iteration in (4, 5, 6)}
    first, second = vars(arguments_in(folder, 6)), vars(arguments_in(tmp_path, 6))
    names = [n for n in first if n.startswith("megalodon_")] + list(UNUSUAL_MODEL)
    assert {name: first[name] for name in names} == {name: second[name] for name in names}


def test_an_argument_overrides_the_checkpoints(trained, tmp_path):
    folder, whole = trained
    resumed = train(
        tmp_path,
        *("--load", str(folder), "--ckpt-step", "3", "--use-checkpoint-args"),
        *(*DATA, *SCHEDULE, *save_to(tmp_path), "--megalodon-chunk-size", "20"),
    )
    assert resumed.losses[4] != whole.losses[4]
    recorded = vars(arguments_in(tmp_path, 6))
    assert recorded["megalodon_chunk_size"] == 20 and recorded["megalodon_z_dim"] == 24


def test_generation_equals_greedy_whole_passes(trained, load_model):
    """Across several chunk boundaries (chunks of 12), with every value from the checkpoint."""
    checkpoint, _ = trained
    options = ("--tokens", NUM_TOKENS, "--temperature", "0", "--ignore-end")
    generated = generate(checkpoint, "--prompt", " ".join(map(str, PROMPT)), *options)
    assert generated.returncode == 0, generated.stdout[-3000:]
    tokens = [int(token) for token in generated.stdout.splitlines()[-1].split()]
    assert tokens[: len(PROMPT)] == PROMPT and len(tokens) == len(PROMPT) + NUM_TOKENS
    # What comes next at each position does not depend on what follows, so one pass has them all.
    with torch.no_grad():
        logits = load_model(checkpoint).model(torch.tensor([tokens]), None, None)[0, :, :VOCABULARY]
    assert logits.argmax(-1)[len(PROMPT) - 1 : -1].tolist() == tokens[len(PROMPT) :]
