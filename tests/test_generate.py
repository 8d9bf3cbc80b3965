"""Generation: greedy tokens, streamed text, prompts, and a state that does not grow."""

import io
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from building import build, randomize
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from megalodon_mcore.generate import decode_stream, generate_tokens, read_prompt
from megalodon_mcore.sampling import Sampler
from megalodon_mcore.streaming import StreamingModel, StreamState

CHUNK = 8


@pytest.fixture
def model(megatron):
    model, _ = build(dict(chunk_size=CHUNK), vocab_size=64)
    randomize(model)
    return model.eval()


def test_greedy_tokens_equal_whole_passes_across_chunks(model):
    prompt = torch.randint(60, (11,)).tolist()
    generated = list(
        generate_tokens(StreamingModel(model, 5), prompt, 30, Sampler(temperature=0.0), 60)
    )
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(30):
            logits = model(torch.tensor([tokens]), None, None)
            tokens.append(int(logits[0, -1, :60].argmax()))
    assert generated == tokens[len(prompt) :]


def test_seed_fixes_the_text_and_the_stop_token_ends_it(model):
    def generate(seed, stop_token=None):
        stream = StreamingModel(model)
        return list(generate_tokens(stream, [1, 2], 40, Sampler(), 64, seed, stop_token))

    assert generate(7) == generate(7) != generate(8)
    stop = generate(7)[5]
    assert generate(7, stop) == generate(7)[: generate(7).index(stop)]


def state_bytes(state: StreamState) -> int:
    tensors = [*state.final_norm]
    for layer in state.layers:
        tensors += [*layer.timestep_norm, layer.cema, *layer.attention]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_state_does_not_grow(model):
    stream, state = StreamingModel(model), None
    at_chunk_position: dict[int, set[int]] = {}
    for position in range(5 * CHUNK):
        _, state = stream(torch.tensor([[position % 64]]), state)
        at_chunk_position.setdefault(position % CHUNK, set()).add(state_bytes(state))
    assert all(len(sizes) == 1 for sizes in at_chunk_position.values())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from megatron.core.tokenizers import MegatronTokenizer

    folder = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
    )


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 and 🦈🦈", "é" * 40, "\n\t x"])
def test_streamed_text_is_the_decoded_text(tokenizer, text):
    ids = list(text.encode())
    assert "".join(decode_stream(tokenizer, list(b"prompt"), iter(ids))) == text


def test_streamed_text_is_the_decoded_text_after_invalid_bytes(tokenizer):
    ids = [0xFF, 0xFF, 0xE2, 0x82, 0xAC, 0x42]
    assert "".join(decode_stream(tokenizer, [], iter(ids))) == "\ufffd\ufffd\u20acB"
    assert "".join(decode_stream(tokenizer, [], iter(ids[:4]))) == "\ufffd\ufffd\ufffd"
    chance = random.Random(0)
    whole = "a\u00e9\u20ac\U0001f988"
    for _ in range(50):
        ids = [b for _ in range(20) for b in chance.choice(whole).encode()[: chance.randint(1, 4)]]
        ids += chance.choices(range(256), k=20)
        pieces = list(decode_stream(tokenizer, [], iter(ids)))
        assert "".join(pieces) == bytes(ids).decode(errors="replace")


class OneMarkAByte:
    """As SentencePiece does: of an unfinished character every byte is a replacement mark."""

    def detokenize(self, ids):
        return bytes(ids).decode(errors="surrogateescape").translate(self.marks)

    marks = {0xDC00 + byte: "\ufffd" for byte in range(128, 256)}


def test_streamed_text_waits_for_characters_whose_every_byte_is_a_mark():
    text = "\ufffd\ufffd\u20acB\U0001f988\ufffd"
    ids = [0xFF, 0xFF, *"\u20acB\U0001f988".encode(), 0xF0]
    assert "".join(decode_stream(OneMarkAByte(), [], iter(ids))) == text
    assert list(decode_stream(OneMarkAByte(), [], iter([0xFF] * 5))) == [
        *("", "", "", "\ufffd", "\ufffd", "\ufffd" * 3)
    ]


def test_prompt_comes_from_argument_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("from file é", encoding="utf-8")
    assert read_prompt(Namespace(prompt="given", prompt_file=None)) == "given"
    file = tmp_path / "prompt.txt"
    assert read_prompt(Namespace(prompt=None, prompt_file=file)) == "from file é"
    file.write_text("\ufefffrom an editor", encoding="utf-8")
    assert read_prompt(Namespace(prompt=None, prompt_file=file)) == "from an editor"
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffpiped"))
    assert read_prompt(Namespace(prompt=None, prompt_file=Path("-"))) == "piped"
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert read_prompt(Namespace(prompt=None, prompt_file=Path("-"))) == "piped"
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert read_prompt(Namespace(prompt=None, prompt_file=None)) == "piped"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--temperature", "nan"), "--temperature is nan; it takes 0 or more."),
        (("--temperature", "inf"), "--temperature is inf; it takes 0 or more."),
        (("--seed", str(2**64)), f"--seed is {2**64}; it takes an integer of 64 bits."),
        (("--prompt-file", "folder"), "--prompt-file is folder, which cannot be read as text: "),
        (("--prompt-file", "bytes"), "--prompt-file is bytes, which cannot be read as text: "),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_read(
    given, sentence, tmp_path, monkeypatch, capsys
):
    from megalodon_mcore.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    prompt = () if "--prompt-file" in given else ("--prompt", "text")
    assert main(["generate", "--checkpoint", "missing", *prompt, *given]) == 2
    assert capsys.readouterr().err.startswith(f"megalodon-mcore generate: {sentence}")
