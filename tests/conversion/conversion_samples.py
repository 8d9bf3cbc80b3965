"""Small models in every format, for tests of conversion."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from hf.hf_models import random_model
from megalodon_mcore.__main__ import main
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer

SHAPES = {
    "one-head": dict(chunk_size=16, vocab_size=257),
    "swiglu-two-heads-rescale": dict(
        num_attention_heads=2,
        chunk_size=8,
        z_dim=8,
        value_dim=24,
        cema_ndim=3,
        norm_num_groups=4,
        swiglu=True,
        rescale_nffn=True,
        dropout=0.1,
        norm_eps=1e-6,
    ),
    "tied-scaled-four-heads": dict(
        num_attention_heads=4,
        chunk_size=13,
        z_dim=16,
        norm_num_groups=8,
        scale_embedding=True,
        tie_word_embeddings=True,
        rope_theta=100_000.0,
        vocab_size=128,
    ),
}
"""Vocabularies of 257 and 61, which Megatron pads, and of 128, which it does not."""


def build(name, **changes):
    """A Hugging Face model of one of SHAPES."""
    return random_model(**(dict(vocab_size=61) | SHAPES[name] | changes))


def hf_folder(path, name, dtype=torch.float32, tokenizer=False, **changes):
    """A folder as save_pretrained writes it."""
    build(name, **changes).to(dtype).save_pretrained(path)
    if tokenizer:
        for file in write_byte_tokenizer(path.parent / "byte-tokenizer").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    return path


def convert(source, target, given, made, *options):
    """Runs the command; returns its exit status."""
    return main(
        ["convert", "--from", source, "--to", target, str(given), str(made), *map(str, options)]
    )


def hf_tensors(folder):
    """All tensors of a Hugging Face folder, whatever its files."""
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(actual, expected):
    """Bit by bit, types and names included."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def contents(folder):
    """Every file below a folder and its bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }
