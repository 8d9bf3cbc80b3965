"""tests/gpu.sh without a GPU: all its stages, with the oldest Triton that setup.py takes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"compile", "correctness", "million", "tests", "memcheck", "timing", "steps", "sweep"}


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
    assert {row["capability"] for row in compiled} == {80, 90, 100}
    card = next(row for row in rows if row["case"] == "card")
    assert card["triton"].startswith("3.6.")
    # There is no clock whose times would mean anything.
    for row in rows:
        for name in ("took_s", "ms", "both_ms", "tokens_per_s", "bandwidth"):
            assert name not in row
    assert "a rehearsal: no times" in done.stdout


def test_what_cannot_run_is_said_in_a_sentence(tmp_path):
    done = run("--rehearse", "--only", "speed", "--out", tmp_path)
    assert done.returncode == 2 and "the stages are compile, correctness" in done.stderr
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
