"""Every pair of formats, there and back, bit by bit, on every option."""

import json

import pytest
import torch
from conversion_samples import (
    SHAPES,
    assert_same_tensors,
    contents,
    convert,
    hf_folder,
    hf_tensors,
)
from transformers import AutoConfig, AutoTokenizer

from megalodon_mcore.conversion.hf_folder import open_hf
from megalodon_mcore.conversion.mcore_checkpoint import open_mcore
from megalodon_mcore.conversion.released import open_released
from megalodon_mcore.data.byte_tokenizer import encode_bytes
from megalodon_mcore.parameters import number_of_values, parameters

CHAINS = [
    ("hf",),
    ("mcore",),
    ("released",),
    ("mcore", "mcore"),
    ("released", "released"),
    ("mcore", "released"),
    ("released", "mcore"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back(name, dtype, tmp_path):
    start = hf_folder(tmp_path / "start", name, dtype)
    before, expected = contents(start), hf_tensors(start)
    assert {z.dtype for z in expected.values()} == {dtype, torch.float32}
    config = open_hf(start).config
    for number, chain in enumerate(CHAINS):
        kind, place = "hf", start
        for step, target in enumerate((*chain, "hf")):
            made = tmp_path / f"{number}-{step}-{target}"
            ranks = 2 if number % 2 and config.num_heads % 2 == 0 else 1
            options = ("--model-parallel-size", ranks) if target == "released" else ()
            assert convert(kind, target, place, made, *options) == 0
            kind, place = target, made
        assert_same_tensors(hf_tensors(place), expected)
        assert open_hf(place).config == config
    assert contents(start) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", SHAPES)
def test_all_readers_see_one_architecture(name, tmp_path):
    start = hf_folder(tmp_path / "hf", name)
    convert("hf", "mcore", start, tmp_path / "mcore", "--make-vocab-size-divisible-by", 64)
    convert("hf", "released", start, tmp_path / "released")
    models = [
        open_hf(start),
        open_mcore(tmp_path / "mcore"),
        open_released(tmp_path / "released"),
    ]
    assert len({model.config for model in models}) == 1
    tensors = hf_tensors(start)
    assert number_of_values(models[0].config) == sum(z.numel() for z in tensors.values())
    for parameter in parameters(models[0].config):
        for model in models:
            assert torch.equal(model.read(parameter), tensors[parameter.hf]), parameter.hf


@pytest.mark.parametrize(("padding", "rows"), [(1, 257), (64, 320), (128, 384), (257, 257)])
def test_the_vocabulary_is_padded_with_zeros(padding, rows, tmp_path):
    from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader

    start = hf_folder(tmp_path / "hf", "one-head")
    made = tmp_path / "mcore"
    convert("hf", "mcore", start, made, "--make-vocab-size-divisible-by", padding)
    reader = TorchDistReader(made / "release")
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        whole = reader.read(key, [(0, rows), (0, 32)])
        assert torch.equal(whole[:257], hf_tensors(start)[name])
        assert not whole[257:].any()
    convert("mcore", "hf", made, tmp_path / "again")
    assert_same_tensors(hf_tensors(tmp_path / "again"), hf_tensors(start))


def test_bf16_and_back_loses_what_bf16_has_not_and_keeps_the_rest_float32(tmp_path):
    start = hf_folder(tmp_path / "start", "swiglu-two-heads-rescale")
    convert("hf", "mcore", start, tmp_path / "mcore", "--dtype", "bf16")
    convert("mcore", "released", tmp_path / "mcore", tmp_path / "released")
    convert("released", "hf", tmp_path / "released", tmp_path / "bf16")
    convert("hf", "hf", tmp_path / "bf16", tmp_path / "wide", "--dtype", "float32")
    wide, exact = ("cema", "norm", "query_key", "rescale"), hf_tensors(start)
    for name, tensor in hf_tensors(tmp_path / "bf16").items():
        if any(part in name for part in wide):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name])
        else:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16())
    for name, tensor in hf_tensors(tmp_path / "wide").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), exact[name].bfloat16()), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_their_index(tmp_path):
    from transformers import AutoModelForCausalLM

    start = hf_folder(tmp_path / "start", "one-head")
    made = tmp_path / "sharded"
    convert("hf", "hf", start, made, "--max-shard-size", "20KB")
    files = sorted(made.glob("*.safetensors"))
    assert len(files) > 4
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_parameters"] == sum(
        z.numel() for z in hf_tensors(start).values()
    )
    largest = max(z.nbytes for z in hf_tensors(start).values())
    assert all(file.stat().st_size < max(20_000, largest) + 4096 for file in files)
    assert_same_tensors(hf_tensors(made), hf_tensors(start))
    convert("hf", "hf", made, tmp_path / "whole")
    assert_same_tensors(hf_tensors(tmp_path / "whole"), hf_tensors(start))
    loaded = AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True)
    assert_same_tensors(dict(loaded.named_parameters()), hf_tensors(start))


def test_the_tokenizer_travels(tmp_path):
    start = hf_folder(tmp_path / "start", "one-head", tokenizer=True)
    convert("hf", "mcore", start, tmp_path / "mcore")
    convert("mcore", "released", tmp_path / "mcore", tmp_path / "released")
    convert("released", "hf", tmp_path / "released", tmp_path / "hf")
    text = "Größe <|endoftext|> 語\n"
    for folder in (tmp_path / "mcore" / "tokenizer", tmp_path / "hf"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer(text)["input_ids"] == encode_bytes(text).tolist()
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert len(tokenizer) == 257 and tokenizer.eos_token_id == 256
    batch = tokenizer(["long", "a"], padding=True)  # of the export, for generation
    assert batch["attention_mask"] == [[1] * 4, [0] * 3 + [1]]
    configuration = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert configuration.eos_token_id == configuration.pad_token_id == 256


def test_a_sentencepiece_model_travels(tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=30
    )
    start = hf_folder(tmp_path / "start", "one-head", vocab_size=30)
    options = ("--tokenizer", tmp_path / "sp.model")
    assert convert("hf", "mcore", start, tmp_path / "mcore", *options) == 0
    assert convert("mcore", "released", tmp_path / "mcore", tmp_path / "released") == 0
    assert convert("released", "hf", tmp_path / "released", tmp_path / "hf") == 0
    assert_same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(start))
    path = json.loads((tmp_path / "released" / "config.json").read_text())["tokenizer"]["path"]
    for file in (tmp_path / "released" / path, tmp_path / "hf" / "tokenizer.model"):
        processor = SentencePieceProcessor(model_file=str(file))
        assert processor.vocab_size() == 30
    configuration = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert configuration["eos_token_id"] == processor.eos_id()
    assert open_mcore(tmp_path / "mcore").tokenizer.kind == "GPTSentencePieceTokenizer"


def test_a_fine_tuned_folder_comes_back(tmp_path):
    from transformers import AutoModelForCausalLM

    start = hf_folder(tmp_path / "start", "tied-scaled-four-heads")
    convert("hf", "hf", start, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    tokens = torch.randint(128, (2, 30))
    model.train()(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path / "tuned")
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert not torch.equal(
        expected["model.embed_tokens.weight"], hf_tensors(start)["model.embed_tokens.weight"]
    )
    convert("hf", "mcore", tmp_path / "tuned", tmp_path / "mcore")
    convert("mcore", "hf", tmp_path / "mcore", tmp_path / "again")
    assert_same_tensors(hf_tensors(tmp_path / "again"), expected)
