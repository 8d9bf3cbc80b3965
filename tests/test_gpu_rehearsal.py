"""tests/gpu.sh without a GPU: all its stages, with the oldest Triton that setup.py takes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"compile", "correctness", "million", "tests", "memcheck"}
STAGES |= {"training", "serving", "timing", "steps", "tokens", "sweep"}


def run(*arguments, **variables):
    command = ["bash", "tests/gpu.sh", *map(str, arguments)]
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    done = run("--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == STAGES
    assert {row["verdict"] for row in rows} == {"pass", "figure", "missing"}
    compiled = [row for row in rows if row["stage"] == "compile"]
    assert {row["capability"] for row in compiled} == {90}
    card = next(row for row in rows if row["case"] == "card")
    assert card["triton"].startswith("3.6.")
    # There is no clock whose times would mean anything.
    for row in rows:
        for name in ("took_s", "ms", "both_ms", "tokens_per_s", "bandwidth"):
            assert name not in row
    assert "a rehearsal: no times" in done.stdout


def test_what_cannot_run_is_said_in_a_sentence(tmp_path):
    done = run("--rehearse", "--only", "speed", "--out", tmp_path)
    assert done.returncode == 2 and "the stages are compile, memcheck" in done.stderr
    done = run("--rehearse", "--only", "sweep", "--wheels", tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and "has no megatron_core-*.whl" in done.stderr


def test_without_a_gpu_it_names_the_rehearsal(tmp_path):
    done = run("--out", tmp_path, CUDA_VISIBLE_DEVICES="", PYTHON=os.sys.executable)
    assert done.returncode == 2 and "--rehearse does all of it without one" in done.stderr


def test_a_stage_that_dies_or_hangs_leaves_a_row(tmp_path, monkeypatch):
    import run_stages

    (tmp_path / "dying.py").write_text("raise RuntimeError('no luck')")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    options = type("Options", (), {"rehearse": True})
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(run_stages, "GRACE", 0)
    for name in ("dying", "hanging"):
        plan = run_stages.Plan(name, name, 1, ("part",))
        run_stages.run(plan, rows, 3, options, environment)
    found = {row["stage"]: row for row in run_stages.read(rows)}
    assert found["dying"]["verdict"] == "fail" and "no luck" in found["dying"]["problem"]
    assert found["hanging"]["verdict"] == "cut"
    assert run_stages.finish(list(found.values()), []) == 1


class OnACard:
    """A stage that believes to be on a card, with tensors on the CPU; it keeps its rows."""

    rehearse, device, part, left = False, "cpu", "", 1e3

    def __init__(self):
        self.rows = {}

    def add(self, case, verdict, **found):
        self.rows[case] = {"verdict": verdict, **found}

    def attempt(self, case, function, least=0.0):
        verdict, found = function()
        self.add(case, verdict, **found)


@pytest.fixture
def clock(monkeypatch):
    """Every call takes 1 ms, every kernel half of one, at 10^12 bytes/s and 10^14 flop/s."""
    import clock
    import sweep
    import timing

    monkeypatch.setenv("MEGALODON_KERNELS", "torch")
    for module in (timing, sweep):
        monkeypatch.setattr(
            module, "kernel_seconds", lambda stage, run: {"weights_kernel": 5e-4, "copy": 1e-5}
        )
    monkeypatch.setattr(timing, "seconds", lambda stage, run: run() and 1e-3)
    monkeypatch.setattr(timing, "ceilings", lambda stage: clock.Ceilings(1e12, 1e14))
    monkeypatch.setattr(timing, "card", lambda stage: {"card": "none"})
    return clock


def test_what_a_card_would_be_told(clock, monkeypatch):
    """The arithmetic of shares and ratios, which a rehearsal has no times for."""
    import timing

    tiny = timing.SIZES["tiny"]
    monkeypatch.setattr(timing.Shape, "named", lambda name, length: tiny)
    monkeypatch.setattr(timing.torch, "compile", lambda function, dynamic: function)
    stage = OnACard()
    timing.main(stage)
    attention = stage.rows["7b-paper attention: kernels"]
    moved = timing.kernel_bytes(timing.OPERATORS["attention"], tiny, timing.torch.bfloat16)
    flops = timing.OPERATORS["attention"].flops(tiny)
    parts = timing.kernel_flops(tiny, flops)
    share = max(moved["weights_kernel"] / 1e12, parts["weights_kernel"] / 1e14) / 5e-4
    assert attention["kernels"]["weights_kernel"]["share"] == pytest.approx(share)
    assert attention["kernels"]["copy"] == {"ms": pytest.approx(1e-2)}
    assert attention["both_share"] > attention["forward_share"] > 0
    assert stage.rows["200m attention: bmm by panels"]["this_over_ours"] == 1
    assert stage.rows["200m RMSNorm: torch.compile"]["difference"] < 1e-2
    kernels = ("weights_kernel", "scores_kernel", "product_kernel")
    assert sum(parts[kernel] for kernel in kernels) == pytest.approx(sum(flops))


def test_the_sweep_says_what_to_write_down(clock, monkeypatch):
    import sweep

    tiny = sweep.SIZES["tiny"]
    monkeypatch.setattr(sweep.Shape, "named", lambda name, length: tiny)
    monkeypatch.setattr(
        sweep, "compile_all", lambda jobs: ((i, sweep.Report(100, 0, 0)) for i in range(len(jobs)))
    )
    stage = OnACard()
    sweep.main(stage)
    last = [case for case in stage.rows if "write down" in case]
    kinds = dict.fromkeys(f"{name} {kernel}" for name, kernel, *_ in sweep.candidates(False))
    assert [case.split(": write down")[0] for case in last] == list(kinds)
    assert last[0].startswith("attention weights: write down weights=Tile(128")
    assert all(row["verdict"] == "figure" for row in stage.rows.values())
