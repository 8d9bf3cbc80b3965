"""Generation: greedy tokens, streamed text, prompts, and a state that does not grow."""

import io
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from hf.hf_models import random_model
from hf.mixed_models import build_mixed
from megalodon_mcore import generate
from megalodon_mcore.conversion.text import TextTokenizer
from megalodon_mcore.conversion.tokenizers import open_tokenizer
from megalodon_mcore.data.byte_tokenizer import write_byte_tokenizer
from megalodon_mcore.generate import Sampling, StreamedText, generate_tokens, read_prompt

CHUNK = 8
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return random_model(vocab_size=60, chunk_size=CHUNK, piece_length=CHUNK)


def generated(model, prompt, count, sampling=GREEDY, stop_token=None):
    tokens = []
    generate_tokens(model, prompt, count, tokens.append, sampling, stop_token)
    return tokens


@pytest.mark.parametrize("piece", [1, 7, 1024])
@pytest.mark.parametrize("length", [1, 11])
def test_greedy_tokens_equal_whole_passes_across_chunks(model, monkeypatch, piece, length):
    """However many calls of transformers' generate() they come from."""
    monkeypatch.setattr(generate, "PIECE", piece)
    prompt = torch.randint(60, (length,)).tolist()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(30):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    assert generated(model, prompt, 30) == tokens[length:]


@pytest.mark.parametrize("piece", [7, 1024])
def test_greedy_tokens_of_a_mixed_model_equal_whole_passes(monkeypatch, piece):
    monkeypatch.setattr(generate, "PIECE", piece)
    mixed, tokens = build_mixed(piece_length=CHUNK), torch.randint(60, (11,)).tolist()
    made = generated(mixed, tokens, 25)
    with torch.no_grad():
        for token in made:
            logits = mixed(torch.tensor([tokens]), use_cache=False).logits
            assert int(logits[0, -1].argmax()) == token
            tokens.append(token)
    assert len(made) == 25


def test_seed_fixes_the_text_and_the_stop_token_ends_it(model, monkeypatch):
    def sampled(seed, stop_token=None):
        return generated(model, [1, 2], 40, Sampling(seed=seed), stop_token)

    whole = sampled(7)
    assert len(whole) == 40 and whole == sampled(7) != sampled(8)
    stop = whole[5]
    assert sampled(7, stop) == whole[: whole.index(stop)]
    monkeypatch.setattr(generate, "PIECE", 3)
    assert sampled(7) == whole
    assert sampled(7, stop) == whole[: whole.index(stop)]


def test_a_prompt_that_ends_in_the_stop_token_is_continued(model):
    (first,) = generated(model, [1, 2], 1)
    stop = (first + 1) % 60
    assert generated(model, [1, stop], 5, stop_token=None)
    assert len(generated(model, [stop], 5, Sampling(seed=1), stop_token=59)) > 0


def test_sampling_options_narrow_the_choice(model):
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()

    def first_tokens(**options):
        runs = range(60)
        return {generated(model, [1, 2], 1, Sampling(seed=seed, **options))[0] for seed in runs}

    assert first_tokens(top_k=2) == set(order[:2])
    assert first_tokens(top_p=1e-9) == {order[0]}
    for temperature in (1e-3, 1e-30, 5e-324):
        assert first_tokens(temperature=temperature) == {order[0]}
    assert len(first_tokens(temperature=1e30)) > 30


def test_memory_and_the_work_of_a_call_do_not_grow(model, monkeypatch):
    monkeypatch.setattr(generate, "PIECE", 16)
    lengths, places, whole = [], set(), model.generate

    def counted(tokens, past_key_values, **options):
        made = whole(tokens, past_key_values=past_key_values, **options)
        lengths.append((tokens.shape[1], made.shape[1]))
        states = past_key_values.states
        places.update(z.data_ptr() for s in states for z in s.values() if torch.is_tensor(z))
        return made

    monkeypatch.setattr(model, "generate", counted)
    generated(model, list(range(50)), 5 * 16)
    assert lengths == [(1, 17)] * 5
    assert len(places) == 2 * 5 + 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
    return TextTokenizer(open_tokenizer(folder))


def decode_stream(tokenizer, prompt_ids, tokens):
    text = StreamedText(tokenizer, prompt_ids)
    for token in tokens:
        yield text.add(token)
    yield text.held


def test_tokens_of_text_are_megatrons(tokenizer, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    folder = write_byte_tokenizer(tmp_path / "bytes")
    megatron = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
    )
    for text in ("plain", " two  spaces ", "日本語 🦈 <|endoftext|>"):
        ids = tokenizer.tokenize(text)
        assert ids == list(megatron.tokenize(text)) == list(text.encode())
        assert tokenizer.detokenize(ids) == megatron.detokenize(ids) == text
    assert tokenizer.detokenize([65, 256]) == megatron.detokenize([65, 256])
    assert tokenizer.eod == megatron.eod


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


def test_an_environment_that_means_another_model_is_refused(monkeypatch, capsys):
    from megalodon_mcore.__main__ import main

    monkeypatch.setenv("MEGALODON_CONFIG", "chunk_size=8")
    assert main(["generate", "--checkpoint", "missing", "--prompt", "text"]) == 2
    assert "MEGALODON_CONFIG is 'chunk_size=8', but a checkpoint" in capsys.readouterr().err


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """One model with a tokenizer in every format that generate reads."""
    from conversion.conversion_samples import convert, hf_folder

    folder = tmp_path_factory.mktemp("formats")
    places = {
        "hf": hf_folder(folder / "hf", "swiglu-two-heads-rescale", tokenizer=True, vocab_size=257)
    }
    for name in ("mcore", "released"):
        places[name] = folder / name
        assert convert("hf", name, places["hf"], places[name]) == 0
    return places


def test_every_format_generates_the_same_text(formats, capfd):
    from megalodon_mcore.__main__ import main

    said = set()
    options = ("--tokens", "20", "--seed", "3", "--ignore-end", "--prompt", "né")
    for name, place in formats.items():
        tokenizer = ("--tokenizer", str(formats["hf"])) if name == "released" else ()
        assert main(["generate", "--checkpoint", str(place), *options, *tokenizer]) == 0
        said.add(capfd.readouterr().out)
    assert len(said) == 1 and said.pop().startswith("né")


def test_a_state_goes_on_where_the_text_ended(formats, tmp_path, capfd, monkeypatch):
    """As if text and question had been one prompt, cut anywhere while it was read."""
    from megalodon_mcore import state_command
    from megalodon_mcore.__main__ import main

    monkeypatch.setattr(state_command, "PIECE", 7)
    text, model = "a long text " * 9, ("--checkpoint", str(formats["mcore"]))
    sampled = ("--tokens", "20", "--seed", "3", "--ignore-end")
    assert main(["generate", *model, *sampled, "--prompt", text + "what?"]) == 0
    whole = capfd.readouterr().out
    state = ("--state", str(tmp_path / "state"))
    (tmp_path / "text").write_text(text)
    saved = ("--prompt-file", str(tmp_path / "text"), "--out", state[1])
    assert main(["state", "save", *model, *saved]) == 0
    said = capfd.readouterr().out
    assert said.startswith(f"{len(text)} tokens read; {state[1]} has ")
    assert main(["state", "load", *model, *state, *sampled, "--prompt", "what?"]) == 0
    assert text + capfd.readouterr().out == whole
    assert main(["state", "load", *model, *state, *sampled, "--prompt", ""]) == 0
    alone = capfd.readouterr().out
    assert main(["generate", *model, *sampled, "--prompt", text]) == 0
    assert text + alone == capfd.readouterr().out
    assert main(["state", "save", *model, *saved]) == 2
    assert "which exists; --overwrite replaces a file." in capfd.readouterr().err
    assert main(["state", "save", *model, *saved, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("save", "--out", "state", "--prompt", "a"), "The text has 1 tokens; a state is of two"),
        (("save", "--out", "no/state", "--prompt", "ab"), "--out is no/state, but no is no folder"),
        (("load", "--state", "state", "--prompt", "a"), "state is no file."),
        (("load", "--state", "text", "--prompt", "a"), "text is damaged: "),
        (("load", "--state", "state", "--prompt", "a", "--tokens", "0"), "--tokens is 0; it takes"),
    ],
)
def test_wrong_states_are_refused(formats, tmp_path, monkeypatch, capsys, given, sentence):
    from megalodon_mcore.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no state")
    kind, *options = given
    assert main(["state", kind, "--checkpoint", str(formats["hf"]), *options]) == 2
    assert f"megalodon-mcore state: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_what_does_not_go_with_a_format_is_refused(formats, tmp_path, capsys):
    from megalodon_mcore.__main__ import main

    for options, sentence in (
        (("--checkpoint", formats["hf"], "--iteration", 3), "--iteration is 3, but "),
        (("--checkpoint", formats["hf"], "--tokenizer", tmp_path), f"--tokenizer is {tmp_path}, "),
        (("--checkpoint", tmp_path), f"{tmp_path} holds no finished checkpoint; give the"),
    ):
        assert main(["generate", "--prompt", "text", *map(str, options)]) == 2
        assert capsys.readouterr().err.startswith(f"megalodon-mcore generate: {sentence}")


def test_a_model_is_built_with_one_copy_of_its_weights(formats, monkeypatch):
    """Tensor by tensor: each read is alone beside what the model already holds."""
    from megalodon_mcore.conversion.hf_folder import open_hf
    from megalodon_mcore.conversion.hf_model import hf_model
    from megalodon_mcore.conversion.model import OpenModel

    read, alive = OpenModel.read, []

    def counted(self, parameter, dtype=None):
        tensor = read(self, parameter, dtype)
        alive.append(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(OpenModel, "read", counted)
    model = hf_model(open_hf(formats["hf"]))
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert held == set(alive) and not any(p.is_meta for p in model.parameters())
