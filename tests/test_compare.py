"""What compare finds before and after training: equal sizes, texts, refusals, and its words."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megalodon_mcore.__main__ import main
from megalodon_mcore.compare import (
    ablations,
    command,
    equal_size,
    numbers,
    plots,
    report,
    runs,
    texts,
)
from megalodon_mcore.compare.command import Comparison
from megalodon_mcore.compare.presets import PRESETS, preset
from megalodon_mcore.folder_lock import lock_folder


def with_values(name="tiny", **values):
    return dataclasses.replace(preset(name), **values)


@pytest.mark.parametrize("name", PRESETS)
def test_every_peer_has_equally_many_parameters(name):
    settings = with_values(name, peers=("megalodon", "gpt", "gpt-window", "gpt-he", "MM*M", "M-M*"))
    shapes = equal_size.equal_shapes(settings, 264)
    target = shapes["megalodon"].parameters
    assert shapes["megalodon"].hidden_size == settings.hidden_size
    for peer, shape in shapes.items():
        assert abs(shape.parameters / target - 1) <= 0.01, peer
        assert shape.heads * settings.head_dim in (0, shape.hidden_size)


def test_no_equal_size_is_one_sentence():
    # Nearly all of it is the vocabulary's, in steps of which no width is near.
    settings = with_values(hidden_size=32, head_dim=256)
    with pytest.raises(
        ValueError, match=r"^--hidden-size is 32, .* gpt-he .* take .*--head-dim"
    ) as e:
        equal_size.equal_shapes(settings, 200_000)
    assert "\n" not in str(e.value)


def test_runs_differ_in_the_model_alone():
    settings = with_values(peers=("megalodon", "gpt", "gpt-window", "M*"))
    shapes = equal_size.equal_shapes(settings, 264)
    for peer, shape in shapes.items():
        words = runs.model_arguments(settings, peer, shape)
        own = {"--seed", "--lr", "--seq-length", "--train-iters", "--global-batch-size"}
        assert not own & set(words)
        assert ("--spec" in words) == peer.startswith("gpt")
        assert ("--window-size" in words) == (peer == "gpt-window")


def test_texts_that_are_long_enough_come_first():
    pieces = [np.arange(n) for n in (5, 41, 8, 9, 25)]
    rows, alone = texts.long_rows(pieces, 4, 20)
    assert (rows.shape, alone) == ((4, 21), 3)
    np.testing.assert_array_equal(rows[1], np.arange(20, 41))
    np.testing.assert_array_equal(rows[3], np.concatenate([np.arange(n) for n in (5, 8, 9)])[:21])
    with pytest.raises(ValueError, match=r"^--rows is 5 of 20 tokens .* 88 validation .* make 4;"):
        texts.long_rows(pieces, 5, 20)


def test_unigram_loss_is_the_entropy_of_even_tokens():
    train = [np.tile(np.arange(4), 50_000)]
    rows = np.tile(np.arange(4), (2, 8))
    assert texts.unigram_loss(train, rows, 4) == pytest.approx(np.log(4), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "llama"], "--peers is llama; it takes megalodon, gpt, gpt-window"),
        (["--patterns", "MQ"], "--patterns has 'Q'"),
        (["--patterns", "MME"], "--patterns is MME, but equal parameters"),
        (["--patterns", "M|M"], "--patterns is M|M"),
        (["--patterns", "**"], "--patterns is **, which has no Megalodon block"),
        (["--seq-length", "100"], "--seq-length is 100, of which --chunk-size 16 is no part"),
        (["--iterations", "0"], "--iterations is 0; it takes a positive number"),
        (["--seeds", "1", "1"], "--seeds is 1 1; give each once"),
        (["--seeds", "99999999999"], "--seeds is 99999999999; it takes numbers to 2147483647"),
        (["--learning-rates", "nan"], "--learning-rates is nan; it takes a positive number"),
        (["--learning-rates", "inf"], "--learning-rates is inf; it takes a positive number"),
        (["--learning-rates", "1e-3", "0.00100000001"], "is 0.001 0.001; give each once"),
        (["--memory", "nan"], "--memory is nan; it takes a positive number"),
        (["--head-dim", "7"], "--head-dim is 7; RoPE takes pairs"),
        (["--iterations", "1"], "--iterations is 1; it takes at least 2"),
        (["--ablations", "no-attention"], "--ablations has no-attention; it takes no-cema"),
        (["--ablations", "chunk-48"], "has chunk-48, of which --seq-length 64 is no multiple"),
        (["--ablations", "gpt-init-e"], "has gpt-init-e; e is no positive number"),
        (["--ablations", "no-cema", "no-cema"], "--ablations is no-cema no-cema; give each once"),
        (["--peers", "gpt", "--ablations", "no-cema"], "but --peers has no megalodon; add it"),
        (
            ["--ablations", "no-cema", "--ablation-seeds", "3"],
            "--ablation-seeds has 3, but --seeds is 1 2; take some of these",
        ),
        (["--precision", "fp8"], "--precision is fp8; it takes float32 or bf16"),
        (["--micro-batch-size", "3"], "--batch-size is 4, no multiple of --micro-batch-size 3"),
        (["--processes", "3"], "--processes is 3"),
        (["--times-longer", "3"], "--times-longer is 3; it takes a power of two"),
        (["--implementation", "transformer_engine"], "run on GPUs alone, and there is none"),
        (
            ["--peers", "gpt-window", "--implementation", "transformer_engine"],
            "take --implementation local",
        ),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(arguments, sentence, tmp_path, capsys):
    out = ["--preset", "tiny", "--out", str(tmp_path / "out")]
    assert main(["compare", *out, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [z for z in lines if z.startswith("megalodon-mcore compare: ")]
    assert sentence in line and line is lines[-1]
    assert not (tmp_path / "out").exists()


def test_values_that_were_refused_bind_nobody(tmp_path, monkeypatch, capsys):
    """Another try may have other values in the same folder, until something is measured there."""

    def measured(job, arguments, result, name):
        result.parent.mkdir()
        result.with_suffix(".job").touch()
        raise ValueError("measured")

    monkeypatch.setattr(runs, "measure", measured)
    texts = [tmp_path / f"{number}.txt" for number in range(2)]
    texts[0].write_text("too few")
    texts[1].write_text("".join(f"line {n}\n" for n in range(3000)))
    common = ["compare", "--preset", "tiny", "--out", str(tmp_path / "out"), "--text"]
    assert main([*common, str(texts[0])]) == 2
    assert "--rows is 2 of 256 tokens" in capsys.readouterr().err
    for more, sentence in (([], "measured"), (["--rows", "3"], "--rows is 3, but --out")):
        assert main([*common, str(texts[1]), *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main([*common[:3], "--text", str(texts[1]), "--out", str(texts[0])]) == 2
    assert f"File exists: '{texts[0]}'; --out is {texts[0]}." in capsys.readouterr().err
    assert main([*common, str(tmp_path / "nowhere")]) == 2
    assert "--text is " in capsys.readouterr().err  # Of what is measured there.
    (tmp_path / "other").mkdir()
    for content, sentence in (("{", "is damaged or somebody else's"), ('{"a": 1}', "but --out")):
        (tmp_path / "other" / "settings.json").write_text(content)
        assert main([*common[:4], str(tmp_path / "other"), "--text", str(texts[1])]) == 2
        assert sentence in capsys.readouterr().err
        assert (tmp_path / "other" / "settings.json").read_text() == content
    missing = ["--text", str(tmp_path / "nowhere")]
    assert main([*common[:4], str(tmp_path / "third"), *missing]) == 2
    assert "compare: INPUT" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{", "[1]"])
def test_a_damaged_result_is_measured_again(damage, tmp_path, monkeypatch):
    def found(command, arguments, log, name, steps):
        (tmp_path / "speed.json").write_text('{"speed": 1}')

    monkeypatch.setattr(runs, "run", found)
    (tmp_path / "speed.json").write_text(damage)
    assert runs.measure({}, [], tmp_path / "speed.json", "name") == {"speed": 1}


def test_a_done_run_without_its_files_is_one_sentence(tmp_path, monkeypatch):
    """In the checkpoint's place Megatron would take first values."""
    home = tmp_path / "gpt" / "seed-1-0.01"
    home.mkdir(parents=True)
    (home / "done").touch()
    comparison = Comparison(with_values(), tmp_path)
    with pytest.raises(ValueError, match=r"is done, but lacks TensorBoard's .* remove that folder"):
        comparison.run(home, "name", [], 10)
    monkeypatch.setattr(Comparison, "arguments", lambda self, *given: [])
    monkeypatch.setattr(Comparison, "run", lambda self, *given: {})
    for tracker in (None, "", "23", "24"):
        if tracker is not None:
            (home / "checkpoint").mkdir(exist_ok=True)
            (home / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(tracker)
        if tracker != "24":
            with pytest.raises(ValueError, match="is done, but lacks the checkpoint of step 24"):
                comparison.final("gpt", tmp_path / "gpt", 1e-2, 1)
    monkeypatch.setattr(Comparison, "measure", lambda self, *given, rows: {"reached": 4})
    assert comparison.final("gpt", tmp_path / "gpt", 1e-2, 1) == {"seed": 1, "reached": 4}


def test_a_rate_that_diverged_is_not_the_best(tmp_path, monkeypatch):
    """The first one, of which min() alone would think that nothing is less."""
    losses = {1e-3: math.nan, 3e-3: 2.0, 1e-2: 1.5, 3e-2: math.nan}
    comparison = Comparison(with_values(learning_rates=tuple(losses)), tmp_path)
    comparison.shapes["gpt"] = equal_size.Shape(1, 1, 1, 1, 1)
    comparison.models["gpt"] = {}
    monkeypatch.setattr(Comparison, "arguments", lambda self, *given: list(given))
    monkeypatch.setattr(Comparison, "run", lambda self, *given: {"validation": losses[given[2][1]]})
    monkeypatch.setattr(Comparison, "final", lambda self, *given: given)
    found = comparison.train_peer("gpt")
    assert found["learning_rate"] == 1e-2
    assert [rate for _, _, rate, _ in found["seeds"]] == [1e-2] * 2


def test_torchrun_around_compare_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--preset", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert "run it once, with --processes" in capsys.readouterr().err


def test_a_run_is_trained_by_one_process(tmp_path):
    with lock_folder(tmp_path, "--out"):
        with pytest.raises(ValueError, match="in which another process is at work"):
            with lock_folder(tmp_path, "--out"):
                pass
    with lock_folder(tmp_path, "--out"):
        pass


def test_ended_by_a_signal_it_ends_what_it_started(tmp_path):
    script = tmp_path / "script.py"
    # Instead of a command, a process that waits.
    script.write_text(
        "from pathlib import Path\n"
        "from megalodon_mcore.compare import runs\n"
        "class Waiting(runs.subprocess.Popen):\n"
        "    def __init__(self, command, **options):\n"
        "        super().__init__([command[0], '-c', 'import time; time.sleep(60)'], **options)\n"
        "        print(self.pid, flush=True)\n"
        "runs.subprocess.Popen = Waiting\n"
        f"runs.run('pretrain', [], Path({str(tmp_path / 'log')!r}), 'name', 1)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.terminate()
    assert parent.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_paper_prints_commands_of_equal_models(capsys):
    assert main(["compare", "--preset", "paper"]) == 0
    said = capsys.readouterr().out
    assert "# megalodon: 7,385,817,088 parameters" in said
    assert said.count("-m megalodon_mcore pretrain") == 2 and "--hidden-size 4096" in said


@pytest.mark.parametrize("more", [["--layers", "3"], ["--seeds", "1", "2"], ["--patterns", "M*"]])
def test_the_papers_run_takes_no_other_values(more, capsys):
    assert main(["compare", "--preset", "paper", *more]) == 2
    assert f"{' is '.join([more[0], ' '.join(more[1:])])}, but" in capsys.readouterr().err


LENGTH, BIN = 64, 4


def a_peer(losses, beyond=0.0, seconds=1.0, reached=256, rates=(1e-3, 3e-3, 1e-2), best=3e-3):
    """A peer's results: final losses by seed, and how much a longer context harms."""
    seeds = []
    for number, loss in enumerate(losses):
        windowed = [loss] * (256 // BIN)
        whole = [loss + beyond * (z * BIN >= LENGTH) for z in range(reached // BIN)]
        seeds.append(
            {
                "seed": number,
                "steps": list(range(1, 41)),
                "losses": [loss + 1 / step for step in range(1, 41)],
                "validation": loss,
                "seconds_per_step": seconds,
                **{"bin": BIN, "whole": whole, "windowed": windowed, "reached": reached},
                "needs": None if reached == 256 else 9.0,
            }
        )
    speed = [{"length": z, "seconds": seconds * z, "bytes": z} for z in (64, 128)]
    return {
        "shape": dict.fromkeys(("layers", "hidden_size", "ffn_hidden_size", "heads"), 1),
        "parameters": 1000,
        "device": "CPU",
        "flops_per_token": 6000.0,
        "speed": [*speed, {"length": 256, "needs": 9.0}],
        "sweep": [{"learning_rate": rate, "loss": losses[0]} for rate in rates],
        "learning_rate": best,
        "seeds": seeds,
    }


def results(ours, theirs):
    settings = dataclasses.asdict(with_values(seeds=(0, 1, 2), iterations=40))
    return {
        "settings": settings,
        "text": ["a.txt"],
        "text_facts": {
            **{"train_tokens": 10**6, "valid_tokens": 10**5, "rows": 2},
            **{"rows_of_one_document": 1, "unigram_loss": 3.0},
        },
        "peers": {"megalodon": ours, "gpt": theirs},
    }


def finding(words, beginning):
    (line,) = [z for z in words.splitlines() if z.startswith(f"- {beginning}")]
    return line


LOW, HIGH = (1.00, 1.01, 1.02), (1.50, 1.51, 1.52)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (LOW, HIGH, "Megalodon is ahead by 0.5000"),
        (HIGH, LOW, "GPT is ahead by 0.5000"),
        (LOW, (1.005, 1.0, 1.03), "the seeds do not tell them apart: they differ by 0.0017"),
        # Beyond two standard errors, which two seeds have by chance too often.
        ((1.0, 1.02), (1.04, 1.08), "the seeds do not tell them apart: they differ by 0.0500"),
        (LOW[:1], HIGH[:1], "of one seed there is no spread, so nothing is claimed"),
    ],
)
def test_the_verdict_is_the_numbers(ours, theirs, verdict):
    said = report.summary(results(a_peer(ours), a_peer(theirs)))
    for cost in ("tokens", "time", "flops"):
        line = finding(said, f"At equal {cost}")
        assert verdict in line
        assert line.count("ahead") == verdict.count("ahead")


def test_equal_time_is_that_of_the_cheaper_run():
    # GPT is twice as fast: in 20 s Megalodon is at step 20 and GPT at its end.
    said = report.summary(results(a_peer(LOW), a_peer(LOW, seconds=0.5)))
    line = finding(said, "At equal time (20 s of steps)")
    ours = 1.01 + np.mean([1 / 19, 1 / 20])
    theirs = 1.01 + np.mean([1 / 39, 1 / 40])
    assert f"Megalodon {ours:.4f}" in line and f"GPT {theirs:.4f}" in line
    assert "64: 0.50 (1.00)" in finding(said, "Speed of Megalodon over GPT's")


def test_failure_beyond_the_training_length_is_said_of_whoever_fails():
    said = report.summary(results(a_peer(LOW, beyond=-0.05), a_peer(LOW, 0.4, reached=128)))
    assert "gains 0.050 nats" in finding(said, "Megalodon holds to 256 positions, 4 times")
    gpt = finding(said, "GPT fails beyond its training length 64")
    assert "0.400 nats" in gpt and "Memory ended its evaluation at 128 positions." in gpt
    said = report.summary(results(a_peer(LOW, 0.4), a_peer(LOW, 0.05)))
    finding(said, "Megalodon fails beyond")
    assert "loses 0.050 nats" in finding(said, "GPT holds to 256")


def test_what_was_not_asked_for_did_not_fail():
    found = results(a_peer(LOW, reached=64), a_peer(HIGH, reached=64))
    finding(report.summary(found), "GPT could not be evaluated beyond its training length 64. Mem")
    found["settings"]["times_longer"] = 1
    finding(report.summary(found), "GPT was not evaluated beyond its training length 64 (--times")


def test_doubts_are_said():
    said = report.summary(results(a_peer(LOW, best=1e-2), a_peer((3.5, 3.6, 3.7))))
    finding(said, "Megalodon's best learning rate, 0.01, is at an end of its sweep")
    finding(said, "GPT is not below the unigram loss 3.0000")
    few = results(a_peer(LOW), a_peer(HIGH) | {"parameters": 10_000})
    finding(report.summary(few), "10,240 tokens are 1 for each parameter: this is the beginning")


@pytest.mark.parametrize("lost", [(math.nan,) * 3, (1.0, math.inf, 1.0)])
def test_a_run_that_diverged_is_said_and_claims_nothing(lost, tmp_path):
    theirs = a_peer(lost)
    theirs["sweep"][2]["loss"] = math.nan
    found = results(a_peer(LOW), theirs)
    said = report.page(found)
    for cost in ("tokens", "time", "flops"):
        line = finding(said, f"At equal {cost}")
        assert line.endswith("a run diverged, so nothing is claimed.") and "ahead" not in line
    finding(said, "GPT diverged, and of its loss beyond the training length nothing can be said")
    finding(said, "GPT diverged at learning rate 0.003 in seed")
    assert "0.01" in finding(said, "GPT diverged in the sweep at learning rate")
    assert "| diverged |" in said
    plots.draw(found, tmp_path)
    written = json.dumps(command._with_nulls(found), allow_nan=False)
    assert json.loads(written)["peers"]["gpt"]["sweep"][2]["loss"] is None


def test_one_model_alone_is_described_beside_nobody(tmp_path):
    found = results(a_peer(LOW), a_peer(HIGH))
    del found["peers"]["megalodon"]
    page = report.page(found)
    assert "At equal" not in report.summary(found) and "| GPT | 1.5000 | 1.5100 |" in page
    plots.draw(found, tmp_path)


def test_one_learning_rate_is_no_sweep():
    said = report.summary(results(a_peer(LOW, rates=(3e-3,)), a_peer(HIGH)))
    finding(said, "Megalodon was trained with one learning rate, 0.003, which need not be its")
    assert "end of its sweep" not in said


def test_who_has_ended_its_schedule_at_equal_cost_is_the_cheaper():
    """GPT's step takes half the time: at its end, Megalodon is at half of its steps."""
    found = results(a_peer(LOW), a_peer(LOW, seconds=0.5))
    ours, theirs = found["peers"].values()
    at = numbers.least_cost(found, [ours, theirs], "seconds")
    assert at == 20 == numbers.costs(found, theirs)["seconds"] * 40
    # A seed that the machine disturbed costs no more.
    theirs["seeds"][1]["seconds_per_step"] = 3.0
    assert at == numbers.costs(found, theirs)["seconds"] * 40
    assert "the run that is cheaper has ended its\nlearning-rate schedule" in report.page(found)


def test_ablations_are_set_beside_their_model_in_the_same_seeds():
    found = results(a_peer(LOW), a_peer(HIGH))
    found["ablations"] = {
        "no-cema": {"peer": "megalodon", "learning_rate": 3e-3}
        | {"seeds": a_peer((1.2,))["seeds"]},
        "gpt-init-0.05": {"peer": "gpt", "learning_rate": 3e-3}
        | {"seeds": a_peer((1.48, 1.50, 1.51))["seeds"]},
    }
    page = report.page(found)
    assert "| Megalodon: no-cema | 0.003 | 0 | 1.2000 | +0.2000 | - |" in page
    assert "| GPT: gpt-init-0.05 | 0.003 | 0, 1, 2 | 1.4967 ± 0.0153 | -0.0133 | 0.0" in page
    assert "## Ablations" not in report.page(results(a_peer(LOW), a_peer(HIGH)))


@pytest.mark.parametrize(
    ("name", "peer", "arguments"),
    [
        ("no-timestep-norm", "megalodon", ("--spec", ablations.SPECS, "no_timestep_norm")),
        ("chunk-32", "megalodon", ("--megalodon-chunk-size", "32")),
        ("init-bert", "megalodon", ("--megalodon-init-mode", "bert")),
        ("gpt-init-0.05", "gpt", ("--init-method-std", "0.05")),
        ("lr-3e-4", "megalodon", ()),
        ("gpt-lr-3e-4", "gpt", ()),
    ],
)
def test_an_ablation_is_its_model_with_one_thing_changed(name, peer, arguments):
    rate = 3e-4 if "lr-" in name else None
    assert ablations.parse(name) == (peer, arguments, rate)


def test_the_page_has_every_table_and_plots(tmp_path):
    found = results(a_peer(LOW), a_peer(HIGH, 0.4, reached=128))
    page = report.page(found)
    assert "| Megalodon | 1.0000 | 1.0100 | 1.0200 | 1.0100 ± 0.0100 | 1, 1, 1 s |" in page
    assert "| GPT | 256 | - | not measured: memory (scores alone 9.0 GiB) |" in page
    assert "| GPT | 64-128 | 1.9100 | -0.4000 |" in page
    assert "| GPT | 1.5000 | **1.5000** | 1.5000 |" in page
    assert "1 of one document each, 1 of\ndocuments joined" in page
    plots.draw(found, tmp_path)
    for name in ("loss", "speed", "position"):
        assert f"({name}.png)" in page and (tmp_path / f"{name}.png").stat().st_size > 5000
