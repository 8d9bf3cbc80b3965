"""Small folders of models, and the command on them."""

import json

import torch

from hf.hf_models import random_model
from hf.mixed_models import build_mixed
from megalodon_mcore.__main__ import main
from megalodon_mcore.data.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer

BEGIN = 256
CONTEXT = 48
"""Of the Llama."""


def build(kind):
    """A causal model of bytes: "megalodon", "mixed" (with attention and experts) or "llama"."""
    if kind == "megalodon":
        return random_model(vocab_size=VOCAB_SIZE, chunk_size=8, piece_length=16)
    if kind == "mixed":
        return build_mixed(vocab_size=VOCAB_SIZE, piece_length=16)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def save(kind, folder):
    """A folder of `build`'s with the byte tokenizer."""
    build(kind).save_pretrained(folder)
    for file in write_byte_tokenizer(folder.parent / "byte-tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def text_of(count, seed=0):
    """So many bytes of text, most of them letters."""
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(97, 123, (count,), generator=generator).tolist()).decode()


def evaluate(*arguments):
    """Runs the command; returns its exit status."""
    return main(["evaluate", *map(str, arguments)])


def results(folder):
    """What a run wrote, but for what it was given."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del found["run"]
    return found


def evaluate_text(out, model, *arguments):
    """The results of a run on text."""
    assert evaluate("text", "--checkpoint", model, "--output", out, *arguments) == 0
    return results(out)
