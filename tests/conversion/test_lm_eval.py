"""lm-evaluation-harness scores an export as its logits do, on local text, offline."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_samples import build, convert, hf_folder

from megalodon_mcore.__main__ import main
from megalodon_mcore.data.byte_tokenizer import encode_bytes

pytest.importorskip("lm_eval", reason="lm-eval is not installed (it is in the test extra)")

EXAMPLES = Path(__file__).parents[2] / "examples" / "lm_eval"
NAME, BEGIN = "one-head", 256
DOCUMENTS = 20
"""Of a task's 100 questions, so many."""


def log_likelihoods(model, tokens):
    """Of each token but the first, given all before it, from the model's own logits."""
    whole = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(whole[:, :-1]).logits.double()
    return logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[0, :, 0]


def harness(model, text, scores, *given):
    """Runs lm-evaluation-harness on a folder; returns its report's results."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={model},trust_remote_code=True"),
            *("--include_path", str(EXAMPLES), "--metadata", json.dumps({"text": str(text)})),
            *("--log_samples", "--output_path", str(scores), *given),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scores.parent / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (report,) = scores.rglob("results_*.json")
    return json.loads(report.read_text())["results"]


@pytest.mark.slow
def test_its_scores_are_those_of_the_logits(tmp_path):
    start = hf_folder(tmp_path / "start", NAME, tokenizer=True)
    assert convert("hf", "mcore", start, tmp_path / "mcore") == 0
    assert convert("mcore", "hf", tmp_path / "mcore", tmp_path / "export") == 0
    text = 3 * (EXAMPLES / "local_text.py").read_text(encoding="utf-8") + "Ünïcødé"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    given = ["--tasks", "local_perplexity,local_continuation", "--limit", str(DOCUMENTS)]
    results = harness(tmp_path / "export", tmp_path / "text.txt", tmp_path / "scores", *given)

    # lm-eval reads windows of 2,048 tokens; what the last one lacks, it gets as context.
    model = build(NAME)
    tokens, total = [BEGIN, *encode_bytes(text).tolist()], 0.0
    assert len(tokens) > 2 * 2048
    for first in range(0, len(tokens) - 1, 2048):
        last = min(first + 2048, len(tokens) - 1)
        window = tokens[max(0, last - 2048) : last + 1]
        total += log_likelihoods(model, window)[first - last :].sum().item()
    expected = -total / len(text.encode()) / math.log(2)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)

    (samples,) = (tmp_path / "scores").rglob("samples_local_continuation_*.jsonl")
    right = []
    for sample in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
        document, scores = sample["doc"], []
        for choice in document["choices"]:
            # A context's last spaces are scored with what follows.
            kept = len(encode_bytes(document["context"].rstrip()))
            both = encode_bytes(document["context"] + choice).tolist()
            scores.append(log_likelihoods(model, both)[kept - 1 :].sum().item())
        told = [float(answer[0][0]) for answer in sample["resps"]]
        assert told == pytest.approx(scores, rel=1e-5)
        right.append(max(range(len(scores)), key=scores.__getitem__) == document["answer"])
    accuracy = sum(right) / DOCUMENTS
    assert results["local_continuation"]["acc,none"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_it_scores_retrieval_as_evaluate_does(tmp_path):
    folder = hf_folder(tmp_path / "model", NAME, tokenizer=True)
    prompts = ["--lengths", "200", "400", "--depths", "0", "1", "--samples", "1"]
    data, own = tmp_path / "prompts.jsonl", tmp_path / "own"
    assert main(["evaluate", "retrieval-data", "--output", str(data), *prompts]) == 0
    model = ["--checkpoint", str(folder), "--output", str(own)]
    assert main(["evaluate", "retrieval", *model, *prompts]) == 0
    results = harness(folder, data, tmp_path / "scores", "--tasks", "local_retrieval")
    found = json.loads((own / "results.json").read_text())
    assert results["local_retrieval"]["acc,none"] == found["accuracy"]
    (samples,) = (tmp_path / "scores").rglob("samples_local_retrieval_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    assert [-float(row["resps"][0][0][0]) for row in rows] == pytest.approx(
        [cell["mean_answer_nats"] for cell in found["cells"]], rel=1e-5
    )
