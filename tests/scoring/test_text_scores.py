"""Losses of text: against transformers' own, by position, in pieces, batches and resumed runs."""

import math
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf.hf_models import random_model
from megalodon_mcore.data.byte_tokenizer import encode_bytes
from megalodon_mcore.hf.state_file import cache_with, remembered
from megalodon_mcore.scoring import text_scores
from megalodon_mcore.scoring.losses import piece_losses
from megalodon_mcore.scoring.position_bins import PositionBins
from scoring.scored_models import BEGIN, CONTEXT, build, evaluate_text, results, save, text_of

KINDS = ["megalodon", "mixed", "llama"]
LENGTHS = [1, 30, 47, 3, 40, 2]
"""Of documents, in tokens; all of them fit in the Llama's context."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of one document a line."""
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    lines = [text_of(length, seed) for seed, length in enumerate(LENGTHS)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[BEGIN, *encode_bytes(line).tolist()] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_transformers_own(folders, corpus, tmp_path, kind):
    found = evaluate_text(tmp_path / "out", folders[kind], corpus, "--documents", "line")
    model = build(kind)
    for document, row in zip(found["documents"], rows_of(corpus), strict=True):
        tokens = torch.tensor([row])
        with torch.no_grad():
            loss = model(tokens, labels=tokens, use_cache=False).loss.item()
        assert document["nats_per_token"] == pytest.approx(loss, rel=1e-6)
        assert document["tokens"] == document["bytes"] == len(row) - 1
    total = sum(own["nats_per_token"] * own["tokens"] for own in found["documents"])
    whole = found["whole"]
    assert whole["tokens"] == sum(LENGTHS)
    assert whole["nats_per_token"] == pytest.approx(total / sum(LENGTHS), rel=1e-12)
    assert whole["perplexity"] == pytest.approx(math.exp(whole["nats_per_token"]), rel=1e-12)
    assert whole["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(LENGTHS), rel=1e-12)
    assert (tmp_path / "out" / "positions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_a_naive_sum(folders, corpus, tmp_path, kind):
    found = evaluate_text(tmp_path / "out", folders[kind], corpus, "--documents", "line")
    model = build(kind).double()
    sums, counts = {}, {}
    for row in rows_of(corpus):
        with torch.no_grad():
            logits = model(torch.tensor([row[:-1]]), use_cache=False).logits[0]
        for position, token in enumerate(row[1:]):
            low = 0 if position == 0 else 2 ** math.floor(math.log2(position))
            loss = -logits[position].log_softmax(-1)[token].item()
            sums[low] = sums.get(low, 0.0) + loss
            counts[low] = counts.get(low, 0) + 1
    assert [row["first"] for row in found["positions"]] == sorted(sums)
    for row in found["positions"]:
        low = row["first"]
        assert row["last"] == (0 if low == 0 else 2 * low - 1)
        assert row["tokens"] == counts[low]
        assert row["nats_per_token"] == pytest.approx(sums[low] / counts[low], rel=1e-5)


def test_bins_count_every_position_and_its_bytes():
    bins = PositionBins()
    losses, sizes = np.arange(3000.0), np.arange(3000) % 4
    for start in range(0, 3000, 7):
        bins.add(start, losses[start : start + 7], sizes[start : start + 7])
    for row in bins.rows():
        own = slice(row["first"], row["last"] + 1)
        assert row["tokens"] == len(losses[own])
        assert row["bytes"] == sizes[own].sum()
        assert row["nats_per_token"] == pytest.approx(losses[own].mean(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 100])
def test_pieces_and_batches_give_what_single_documents_give(folders, corpus, tmp_path, kind, size):
    """With 1, a Megalodon's documents are pieces of one token; with 100, up to three fit."""
    lines = (corpus, "--documents", "line", "--tokens-per-step")
    single = evaluate_text(tmp_path / "single", folders[kind], *lines, 47)
    other = evaluate_text(tmp_path / "other", folders[kind], *lines, size)
    for one, two in zip(single["documents"], other["documents"], strict=True):
        assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-5)
        assert two["tokens"] == one["tokens"]


@pytest.mark.parametrize("kind", ["megalodon", "mixed"])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_carried_documents_are_one_concatenated_document(folders, corpus, tmp_path, kind, size):
    """Each begin token is read and is not scored."""
    found = evaluate_text(
        *(tmp_path / "out", folders[kind], corpus, "--documents", "line"),
        *("--states", "carry", "--tokens-per-step", size),
    )
    rows = rows_of(corpus)
    whole = torch.tensor([[token for row in rows for token in row]])
    with torch.no_grad():
        logits = build(kind)(whole[:, :-1], use_cache=False).logits[0].double()
    losses = -logits.log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]
    start = 0
    for document, row in zip(found["documents"], rows, strict=True):
        expected = losses[start : start + len(row) - 1].mean().item()
        assert document["nats_per_token"] == pytest.approx(expected, rel=1e-5)
        start += len(row)
    assert found["positions"][0]["tokens"] == len(rows)


class StoppedError(Exception):
    pass


ROUTES = {
    "pieces": ("megalodon", "--tokens-per-step", 16),
    "batches": ("megalodon", "--tokens-per-step", 90),
    "carry": ("megalodon", "--states", "carry", "--tokens-per-step", 7),
    "mixed": ("mixed", "--tokens-per-step", 9),
    "mixed-carry": ("mixed", "--states", "carry", "--tokens-per-step", 16),
    "windows": (
        *("megalodon", "--context", 12, "--longer-documents", "split"),
        *("--tokens-per-step", 24),
    ),
    "windows-of-pieces": (
        *("megalodon", "--context", 12, "--longer-documents", "split"),
        *("--tokens-per-step", 5),
    ),
    "llama": ("llama", "--tokens-per-step", 50),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_stopped_run_goes_on_to_the_same_bits(folders, corpus, tmp_path, monkeypatch, route):
    """Stopped before every second call of the model, again and again."""
    kind, *options = ROUTES[route]
    given = (folders[kind], corpus, "--documents", "line", "--save-every", 0, *options)
    unbroken = evaluate_text(tmp_path / "unbroken", *given)
    calls = [0]

    def stopping(function):
        def call(*arguments):
            calls[0] += 1
            if calls[0] % 2 == 0:
                raise StoppedError
            return function(*arguments)

        return call

    for name in ("batch_losses", "piece_losses"):
        monkeypatch.setattr(text_scores, name, stopping(getattr(text_scores, name)))
    stops = 0
    while True:
        try:
            resumed = evaluate_text(tmp_path / "resumed", *given)
            break
        except StoppedError:
            stops += 1
            assert stops < 200
    assert stops >= 1
    assert resumed == unbroken


def test_a_killed_run_goes_on_to_the_same_bits_and_a_finished_one_stays(folders, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_of(4000), encoding="utf-8")
    given = [text, "--tokens-per-step", 16]
    out = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "megalodon_mcore", "evaluate", "text", "--output", out),
        *("--checkpoint", folders["megalodon"], *given, "--save-every", 0),
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while not (out / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    resumed = evaluate_text(out, folders["megalodon"], *given)
    assert resumed == evaluate_text(tmp_path / "unbroken", folders["megalodon"], *given)
    assert evaluate_text(out, folders["megalodon"], *given) == resumed


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if torch.is_tensor(made):
            self.elements = max(self.elements, made.numel())
        return made


def test_memory_does_not_grow_with_the_document():
    """From 4k to 64k tokens: neither what is remembered nor the largest tensor of a piece."""
    model = random_model(vocab_size=257, chunk_size=64, piece_length=1024)
    cache, seen, tokens = cache_with(model, {}), {}, np.full(1025, 97)
    for step in range(1, 65):
        with Largest() if step in (4, 64) else nullcontext() as largest:
            piece_losses(model, cache, tokens)
        if largest:
            held = sum(tensor.numel() for tensor in remembered(cache, model).values())
            seen[step] = (held, largest.elements)
    assert seen[4] == seen[64]
    assert int(cache.seen) == 64 * 1024


def test_longer_documents_than_the_context_are_cut_or_split_as_asked(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(text_of(100), encoding="utf-8")
    for kind in ("llama", "megalodon"):
        own = (folders[kind], text, *(("--context", CONTEXT) if kind == "megalodon" else ()))
        with pytest.raises(AssertionError):
            evaluate_text(tmp_path / "refused", *own)
        assert "has 100 tokens and the model reads 48 at once" in capsys.readouterr().err
        cut = evaluate_text(tmp_path / f"{kind}-cut", *own, "--longer-documents", "cut")
        split = evaluate_text(tmp_path / f"{kind}-split", *own, "--longer-documents", "split")
        tokens = torch.tensor([[BEGIN, *encode_bytes(text_of(100)).tolist()]])
        losses = []
        for first in range(0, 100, CONTEXT):
            window = tokens[:, first : first + CONTEXT + 1]
            with torch.no_grad():
                logits = build(kind)(window[:, :-1], use_cache=False).logits[0]
            losses += (-logits.log_softmax(-1).gather(-1, window[0, 1:, None])[:, 0]).tolist()
        assert cut["whole"]["tokens"] == cut["whole"]["bytes"] == CONTEXT
        mean = sum(losses[:CONTEXT]) / CONTEXT
        assert cut["whole"]["nats_per_token"] == pytest.approx(mean, rel=1e-5)
        assert split["whole"]["tokens"] == 100
        assert split["whole"]["nats_per_token"] == pytest.approx(sum(losses) / 100, rel=1e-5)
        assert split["positions"][-1]["first"] == 64


def test_every_kind_of_file_is_read_as_documents(folders, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("ein Wört", encoding="utf-8")
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "two"}\n{"body": "3"}\n')
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff\xfe no text")
    found = evaluate_text(
        *(tmp_path / "out", folders["megalodon"], tmp_path / "in", "--json-key", "body")
    )
    assert [own["bytes"] for own in found["documents"]] == [9, 3, 1]
    names = [own["origin"].rpartition("/")[2] for own in found["documents"]]
    assert names == ["a.txt", "b.jsonl:1", "b.jsonl:2"]
    assert results(tmp_path / "out") == found


def test_slots_that_nothing_is_in_are_no_part_of_a_state():
    """An earlier version wrote those of attention layers too."""
    model = build("mixed")
    cache = cache_with(model, {})
    piece_losses(model, cache, np.arange(12))
    held = remembered(cache, model)
    roomy = {
        name: F.pad(z, (0, 0, 0, 5)) if name.endswith(("keys", "values")) else z
        for name, z in held.items()
    }
    assert sum(z.numel() for z in roomy.values()) > sum(z.numel() for z in held.values())
    found = [piece_losses(model, cache_with(model, z), np.arange(9)) for z in (held, roomy)]
    assert np.array_equal(*found)
