"""`compare` from text to report, small; and stopped in the middle, it ends where it would have."""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megalodon_mcore.__main__ import main
from megalodon_mcore.compare import runs
from training import recorded_batches
from training.program_server import OF_THE_SERVER, ProgramServer
from training.reserved_port import reserved_port
from training.runs import RENDEZVOUS, launch

TINY = ("--preset", "tiny", "--learning-rates", "3e-3")
EVERYTHING = (
    *("--patterns", "M*", "--peers", "megalodon", "gpt", "gpt-window"),
    *("--learning-rates", "1e-3", "1e-2", "--processes", "2", "--micro-batch-size", "2"),
)
ABLATIONS = ("no-cema", "no-timestep-norm", "chunk-32", "init-bert", "gpt-init-0.05")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = (f"Line {n} of {n * n} lines.\n" for n in range(number, 3000, 4))
        (path / f"{number}.txt").write_text("".join(lines))
    return str(path)


def run_in_fork(command, arguments, log, name, steps):
    """In place of runs.run: a fork of a process that has Megatron loaded."""
    environment = {name: z for name, z in os.environ.items() if name not in RENDEZVOUS}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    code, output = ProgramServer.run(
        [command, *arguments], runs.processes if command == "pretrain" else 1, environment, 300
    )
    log.write_text(output)
    if code:
        raise ValueError(f"{name}: {output[-4000:]}")


def compare(text, out, *more):
    return main(["compare", *TINY, "--text", text, "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a comparison of everything, on two processes."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run", run_in_fork)
        assert compare(text, out, *EVERYTHING) == 0
    return out


@pytest.mark.slow
def test_a_comparison_has_sane_numbers(whole):
    found = json.loads((whole / "results.json").read_text())
    peers = found["peers"]
    assert list(peers) == ["megalodon", "gpt", "gpt-window", "M*"]
    sizes = [peer["parameters"] for peer in peers.values()]
    assert max(sizes) <= 1.01 * sizes[0] and min(sizes) >= 0.99 * sizes[0]
    for name, peer in peers.items():
        assert [z["learning_rate"] for z in peer["sweep"]] == [1e-3, 1e-2]
        assert peer["learning_rate"] == min(peer["sweep"], key=lambda z: z["loss"])["learning_rate"]
        for seed in peer["seeds"]:
            assert seed["steps"] == list(range(1, 25))
            assert 0 < seed["losses"][-1] < seed["losses"][0]
            assert seed["seconds_per_step"] > 0
            # What Megatron's loop says of the last weights, the measurement finds of them too: the
            # text is alike everywhere.
            mean = sum(seed["windowed"]) / len(seed["windowed"])
            assert mean < found["text_facts"]["unigram_loss"] + 0.3
            assert abs(mean - seed["validation"]) < 0.3
            # Up to the training length, reading the text as a whole is reading the first window.
            first = 64 // seed["bin"]
            assert seed["whole"][:first] == pytest.approx(seed["windowed"][:first], abs=1e-4)
            assert seed["reached"] == 256 and len(seed["whole"]) == len(seed["windowed"]) == 256
        assert [z["length"] for z in peer["speed"]] == [64, 128, 256]
        assert all(z["seconds"] > 0 and z["bytes"] > 0 for z in peer["speed"]), name
    # Scores grow with the square.
    gpt, ours = (peers[name]["speed"] for name in ("gpt", "megalodon"))
    assert gpt[2]["bytes"] > 4.5 * gpt[0]["bytes"] and gpt[2]["bytes"] > ours[2]["bytes"]
    assert peers["gpt"]["seeds"][0]["losses"][0] != peers["gpt"]["seeds"][1]["losses"][0]
    assert peers["gpt"]["seeds"][0]["whole"] != peers["gpt-window"]["seeds"][0]["whole"]


@pytest.mark.slow
def test_models_see_the_same_data(whole):
    """The arguments beside the model's are the same, word for word."""
    own = {"--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads"}
    own |= {"--hybrid-layer-pattern", "--position-embedding-type", "--window-size", "--spec"}
    own |= {"--megalodon-chunk-size", "--megalodon-num-heads", "--save", "--load"}
    own |= {"--tensorboard-dir", "--lr", "--min-lr"}
    commands = {}
    for path in whole.glob("*/seed-2-*/command.txt"):
        options = path.read_text().split(" --")[1:]
        commands[path.parts[-3]] = {z for z in options if f"--{z.split()[0]}" not in own}
    assert len(commands) == 4
    assert all(one == commands["gpt"] for one in commands.values())


@pytest.mark.slow
def test_models_are_given_the_same_batches(whole, tmp_path):
    """What every model's first steps read in each of two processes: another for each seed."""
    jobs, calls = [], {}
    for command in sorted(whole.glob("*/seed-*/command.txt")):
        folder = tmp_path / command.parts[-3] / command.parts[-2][:6]
        folder.mkdir(parents=True)
        jobs.append((str(folder), 2, shlex.split(command.read_text())[2:]))
    with reserved_port() as port:
        program = (recorded_batches.__file__, "pretrain", str(port), json.dumps(jobs))
        done = launch(*program, **OF_THE_SERVER)
    assert done.returncode == 0, done.stdout[-8000:]
    for path in tmp_path.glob("*/*/*.pt"):
        peer, seed, rank = path.relative_to(tmp_path).parts
        read = [(call["tokens"], call["labels"]) for call in torch.load(path)]
        calls.setdefault((seed, rank), {})[peer] = torch.stack([z for pair in read for z in pair])
    assert len(calls) == 4 and all(len(peers) == 4 for peers in calls.values())
    for peers in calls.values():
        assert all(torch.equal(one, peers["gpt"]) for one in peers.values())
    first = [peers["gpt"] for peers in calls.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


@pytest.mark.slow
def test_ablations_are_added_to_what_is_done(whole, text, tmp_path, monkeypatch):
    """Without another run of what is there; each is another model than its own, and learns."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    names = []

    def run_ablation(command, arguments, log, name, steps):
        names.append(name.split()[0].split("/")[0])
        run_in_fork(command, arguments, log, name, steps)

    monkeypatch.setattr(runs, "run", run_ablation)
    assert compare(text, out, *EVERYTHING, "--ablations", *ABLATIONS) == 0
    owners = [f"{'gpt' if name.startswith('gpt') else 'megalodon'}-{name}" for name in ABLATIONS]
    assert list(dict.fromkeys(names)) == owners
    found = json.loads((out / "results.json").read_text())
    ends = {tuple(found["peers"]["megalodon"]["seeds"][0]["losses"])}
    for name in ABLATIONS:
        (seed,) = found["ablations"][name]["seeds"]
        assert seed["seed"] == 1 and seed["losses"][-1] < seed["losses"][0] - 0.1
        assert abs(sum(seed["windowed"]) / len(seed["windowed"]) - seed["validation"]) < 0.3
        ends.add(tuple(seed["losses"]))
    assert len(ends) == 1 + len(ABLATIONS)
    assert "## Ablations" in (out / "report.md").read_text()
    # The first step's loss is of first values, which are the same where the rest is.
    first = found["peers"]["megalodon"]["seeds"][0]["losses"][0]
    assert found["ablations"]["chunk-32"]["seeds"][0]["losses"][0] == pytest.approx(first, rel=0.05)


@pytest.mark.slow
def test_a_second_time_nothing_is_trained_and_other_values_are_refused(
    whole, text, monkeypatch, capsys
):
    def refuse(*_):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(runs, "run", refuse)
    before = (whole / "results.json").read_text()
    assert compare(text, whole, *EVERYTHING) == 0
    assert (whole / "results.json").read_text() == before
    assert compare(text, whole, *EVERYTHING, "--iterations", "25") == 2
    assert "--iterations is 25, but --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_comparison_ends_as_one_that_was_not(text, tmp_path, monkeypatch):
    # So many steps that the last is far off when a checkpoint is seen.
    words = ("--peers", "gpt", "--seeds", "1", "--times-longer", "1", "--iterations", "120")
    words += ("--sweep-iterations", "2")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    # Sweep and speed in forks; the final run in a process of its own, which is killed.
    command = ["compare", *TINY, "--text", text, "--out", str(killed), *words]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megalodon_mcore", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    final = killed / "gpt" / "seed-1-0.003"
    deadline = time.monotonic() + 500
    while runs.last_iteration(final) < 8 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # They hold the folder until they are gone.
    psutil.wait_procs(started)
    assert 8 <= runs.last_iteration(final) < 120 and not (final / "done").exists()

    monkeypatch.setattr(runs, "run", run_in_fork)
    for out in (killed, straight):
        assert compare(text, out, *words) == 0
    one, other = (
        json.loads((out / "results.json").read_text())["peers"]["gpt"] for out in (killed, straight)
    )
    for name in ("losses", "steps", "validation", "whole", "windowed"):
        assert one["seeds"][0][name] == other["seeds"][0][name], name
    assert math.isfinite(one["seeds"][0]["validation"])
    assert one["sweep"] == other["sweep"]
