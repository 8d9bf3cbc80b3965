"""The command's arguments and input: what is wrong is said in one sentence, nothing is ignored."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from conversion.conversion_samples import convert
from megalodon_mcore.folder_lock import lock_folder
from scoring.scored_models import build, evaluate, evaluate_text, save


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save(kind, root / kind) for kind in ("megalodon", "llama")}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words", encoding="utf-8")
    return path


def refused(capsys, *arguments):
    """The sentence that a command ends in."""
    capsys.readouterr()
    assert evaluate(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "megalodon-mcore" in line]
    assert len(lines) == 1
    return lines[0]


def test_any_format_gives_the_same_scores(models, text, tmp_path):
    hf = models["megalodon"]
    assert convert("hf", "mcore", hf, tmp_path / "mcore") == 0
    assert convert("hf", "released", hf, tmp_path / "released") == 0
    expected = evaluate_text(tmp_path / "0", hf, text)
    tokenizer = ("--tokenizer", hf)
    assert evaluate_text(tmp_path / "1", tmp_path / "mcore", text) == expected
    assert evaluate_text(tmp_path / "2", tmp_path / "released", text, *tokenizer) == expected


def test_a_document_of_one_token_is_scored(models, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    for kind, folder in models.items():
        found = evaluate_text(tmp_path / kind, folder, tmp_path / "one.txt")
        assert found["whole"]["tokens"] == 1 and len(found["positions"]) == 1


def test_the_begin_token_is_read(models, text, tmp_path):
    usual = evaluate_text(tmp_path / "0", models["megalodon"], text)
    given = evaluate_text(tmp_path / "1", models["megalodon"], text, "--begin-token", 256)
    other = evaluate_text(tmp_path / "2", models["megalodon"], text, "--begin-token", 97)
    assert usual == given != other


def test_wrong_text_is_one_sentence(models, tmp_path, capsys):
    def sentence(path, *options):
        out = tmp_path / "out"
        given = ("text", path, "--checkpoint", models["megalodon"], "--output", out, *options)
        found = refused(capsys, *given)
        assert not (out / "results.json").exists()
        return found

    assert "does not exist" in sentence(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "has no text" in sentence(tmp_path / "empty.txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 text" in sentence(tmp_path / "latin.txt")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text"')
    assert "line 2: not JSON" in sentence(tmp_path / "broken.jsonl")
    assert "no text under the key 'body'" in sentence(
        tmp_path / "broken.jsonl", "--json-key", "body"
    )
    (tmp_path / "folder").mkdir()
    assert "has no file ending in" in sentence(tmp_path / "folder")
    (tmp_path / "folder" / "gone.txt").symlink_to("nowhere.txt")
    assert "gone.txt is a link to nothing" in sentence(tmp_path / "folder")
    (tmp_path / "folder" / "gone.txt").unlink()
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    assert "pipe.txt is no file, such as a pipe" in sentence(tmp_path / "folder")
    (tmp_path / "some.txt").write_text("some words")
    assert "--max-bytes 0" in sentence(tmp_path / "some.txt", "--max-bytes", 0)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("megalodon", ["--tokens-per-step", 0], "--tokens-per-step is 0"),
        ("megalodon", ["--context", 0], "--context is 0"),
        ("megalodon", ["--save-every", -1], "--save-every is -1.0"),
        ("megalodon", ["--begin-token", 257], "--begin-token is 257"),
        ("megalodon", ["--iteration", 3], "--iteration is 3"),
        ("megalodon", ["--longer-documents", "cut"], "reads documents of any length"),
        ("megalodon", ["--states", "carry", "--context", 4], "--context is 4; give reset"),
        ("llama", ["--states", "carry"], "the model is a LlamaForCausalLM; give reset"),
        ("llama", ["--context", 49], "--context is 49, and the LlamaForCausalLM reads 48"),
        ("llama", ["--iteration", 3], "--iteration is 3"),
        ("llama", ["--context", 4], "has 10 tokens and the model reads 4 at once"),
    ],
)
def test_wrong_options_are_one_sentence(models, text, tmp_path, capsys, kind, options, sentence):
    given = ("text", text, "--checkpoint", models[kind], "--output", tmp_path / "out", *options)
    assert sentence in refused(capsys, *given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lengths", 70], "--lengths has 70, and a prompt of passkey with 1 needles"),
        (["--depths", 1.5], "--depths has 1.5"),
        (["--depths", "nan"], "--depths has nan"),
        (["--samples", 0], "--samples is 0"),
        (["--needles", 0], "--needles is 0"),
        (["--distractors", -1], "--distractors is -1"),
        (["--distractors", 16, "--lengths", 900], "give at most 15"),
        # Of so many there are no names, and drawing them never ended.
        (["--needles", 10**6, "--lengths", 900], "--lengths has 900, in which 1000000 needles"),
        (["--needles", 300_000, "--lengths", 10**7], "are 300000; take at most 210937"),
        (["--lengths", 300, 300], "give each once"),
    ],
)
def test_wrong_retrieval_options_are_one_sentence(models, tmp_path, capsys, options, sentence):
    given = ("retrieval", "--checkpoint", models["megalodon"], "--output", tmp_path / "out")
    assert sentence in refused(capsys, *given, *options)
    given = ("retrieval-data", "--output", tmp_path / "out.jsonl")
    assert sentence in refused(capsys, *given, *options)
    assert list(tmp_path.iterdir()) == []


def test_prompts_longer_than_the_context_are_refused(models, tmp_path, capsys):
    given = ("retrieval", "--checkpoint", models["llama"], "--output", tmp_path / "out")
    assert "reads 48 at once; give shorter ones" in refused(capsys, *given, "--lengths", 200)


def test_an_output_that_cannot_be_written_is_one_sentence(models, text, tmp_path, capsys):
    given = ("text", text, "--checkpoint", models["megalodon"], "--output")
    assert "cannot be written" in refused(capsys, *given, text / "below")
    assert "cannot be written" in refused(
        capsys, "retrieval-data", "--lengths", 300, "--output", text / "below"
    )
    before = sorted(tmp_path.iterdir())
    assert "holds other things" in refused(capsys, *given, tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    data = ("retrieval-data", "--lengths", 300, "--output", text)
    assert "give --overwrite" in refused(capsys, *data)
    assert text.read_text() == "some words"


def test_another_runs_folder_is_not_taken_for_this_ones(models, text, tmp_path, capsys):
    given = ("text", text, "--checkpoint", models["megalodon"], "--output", tmp_path / "out")
    assert evaluate(*given) == 0
    sentence = refused(capsys, *given, "--tokens-per-step", 4)
    assert "whose tokens-per-step was 2048 and is now 4" in sentence
    text.write_text("some other words")
    assert "is not what the run to be resumed read" in refused(capsys, *given)
    assert evaluate(*given, "--overwrite") == 0
    text.write_text("")
    assert "has no text" in refused(capsys, *given)


def test_a_damaged_state_is_one_sentence(models, text, tmp_path, capsys):
    """Whatever became of it: it has a digest of all that it holds."""
    given = ("text", text, "--checkpoint", models["megalodon"], "--output", tmp_path / "out")
    given += ("--states", "carry")
    assert evaluate(*given) == 0
    state = tmp_path / "out" / "state.safetensors"
    whole = state.read_bytes()
    # The number of the document's bytes, which would be another score.
    place = whole.index(b", 10, 10]]")
    for damaged in (
        *(b"", b"damaged", whole[:200], whole[:-5]),
        whole[:-5] + bytes(255 - z for z in whole[-5:]),
        whole[: place + 6] + b"99" + whole[place + 8 :],
    ):
        assert damaged != whole
        state.write_bytes(damaged)
        assert "is damaged" in refused(capsys, *given)
    assert evaluate(*given, "--overwrite") == 0


def test_one_evaluation_at_a_time_writes_a_folder(models, text, tmp_path, capsys):
    given = ("text", text, "--checkpoint", models["megalodon"], "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    lock = lock_folder(tmp_path / "out", "--output")
    assert "in which another process is at work" in refused(capsys, *given)
    lock.close()
    for _ in range(2):
        assert evaluate(*given) == 0


def test_wrong_checkpoints_are_one_sentence(models, text, tmp_path, capsys, monkeypatch):
    def sentence(folder, *options):
        given = ("text", text, "--checkpoint", folder, "--output", tmp_path / "out", *options)
        return refused(capsys, *given)

    assert "which is no folder" in sentence(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    assert "no finished checkpoint" in sentence(tmp_path / "none")
    bare = save("llama", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "has no tokenizer" in sentence(bare)

    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tokenizer = ("--tokenizer", models["llama"])
    assert "which lacks model.layers.2." in sentence(bare, *tokenizer)
    (bare / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert "loads no causal language model" in sentence(bare, *tokenizer)

    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertLMHeadModel(BertConfig(vocab_size=257, initializer_range=0.5, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    assert "from those that follow" in sentence(tmp_path / "bert", *tokenizer)

    model = build("llama")
    model.lm_head.weight.data[3, 3] = math.nan
    model.save_pretrained(tmp_path / "nan")
    assert "lm_head.weight in" in sentence(tmp_path / "nan", *tokenizer)
    assert "has NaN or infinite values" in sentence(tmp_path / "nan", *tokenizer)

    monkeypatch.setenv("MEGALODON_CONFIG", "{}")
    assert "MEGALODON_CONFIG" in sentence(models["megalodon"])


def test_megatron_is_not_imported(models, text, tmp_path):
    code = (
        "import sys; from megalodon_mcore.__main__ import main; status = main(sys.argv[1:]); "
        "assert not any(name.startswith('megatron') for name in sys.modules); sys.exit(status)"
    )
    given = ("evaluate", "text", text, "--checkpoint", models["megalodon"], "--output")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, given), str(tmp_path / "out")], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
