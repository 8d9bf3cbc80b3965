"""Runs the stages one after the other, each in its share of the time, and prints the table."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from stage import ROOT, Stage

# A rehearsal's, on two slow cores with other work; none of its stages should be cut.
REHEARSAL_MINUTES = 240
# Seconds that a stage, which minds the time between its cases, may take for the last one.
GRACE = 10
INTERPRETER = {"TRITON_INTERPRET": "1", "MEGALODON_KERNELS": "triton", "OMP_NUM_THREADS": "1"}


class Plan(NamedTuple):
    """A stage: its module, its share of the time, its parts and how many go at once.

    beside: it runs at the time of the one before it, which nobody's clock minds.
    """

    name: str
    module: str
    share: float
    parts: tuple[str, ...] = ("",)
    at_once: int = 1
    interpreted: bool = False
    beside: bool = False


def plans(rehearse):
    """The most valuable first."""
    from correctness import EVERY, REHEARSED

    types = "bfloat16,float32"
    operators = tuple(EVERY)
    sizes = f"90:7b-paper:{types} 90:200m:{types},float16 90:1.3b:{types}"
    if rehearse:
        # It is the stages that are rehearsed: tests/kernels has all operators and cards.
        operators, sizes = REHEARSED, "90:7b-paper:bfloat16"
    return [
        Plan("compile", "compiling", 1.6, (sizes,)),
        Plan("memcheck", "memcheck", 1.6, interpreted=True, beside=not rehearse),
        Plan("correctness", "correctness", 2.4, operators, 2 if rehearse else 5, True),
        Plan("tests", "kernel_tests", 2.4, beside=not rehearse),
        Plan("training", "command_line", 3.2),
        Plan("serving", "vllm_rows", 3.2, ("answers",), beside=not rehearse),
        Plan("million", "correctness", 0.5, ("million",), 1, True),
        Plan("timing", "timing", 1.2),
        Plan("steps", "steps", 2.0),
        Plan("tokens", "vllm_rows", 2.0, ("speed",)),
        Plan("sweep", "sweep", 0.5),
    ]


def main():
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="for all of it (12)")
    parser.add_argument("--rehearse", action="store_true", help="small, without a GPU, no times")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="(runs/gpu)")
    parser.add_argument("--wheels", type=Path, help="folder with a wheel of megatron-core")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    options = parser.parse_args()
    stages = plans(options.rehearse)
    unknown = set(options.only or ()) - {plan.name for plan in stages}
    if unknown:
        names = ", ".join(plan.name for plan in stages)
        parser.error(f"--only has {', '.join(sorted(unknown))}; the stages are {names}.")
    if not options.rehearse and not has_gpu():
        parser.error("torch finds no CUDA device here; --rehearse does all of it without one.")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * (REHEARSAL_MINUTES if options.rehearse else options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder + "/triton"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": folder + "/inductor", "PYTHONUNBUFFERED": "1"}
        if options.wheels:
            wheels = unpack(options.wheels, folder + "/wheels", parser)
            environment["PYTHONPATH"] += os.pathsep + wheels
        chosen = [plan for plan in stages if not options.only or plan.name in options.only]
        turns = in_turns(chosen)
        shares = [max(plan.share for plan in turn) for turn in turns]
        for place, turn in enumerate(turns):
            seconds = (deadline - time.monotonic()) * shares[place] / sum(shares[place:])
            with ThreadPoolExecutor(len(turn)) as pool:
                for plan in turn:
                    pool.submit(run, plan, rows, max(1.0, seconds), options, environment)
            for plan in turn:
                print_stage(plan.name, read(rows), options.rehearse)
    return finish(read(rows), chosen)


def in_turns(chosen):
    """Lists of the plans that run at one time."""
    turns = []
    for plan in chosen:
        if plan.beside and turns:
            turns[-1].append(plan)
        else:
            turns.append([plan])
    return turns


def has_gpu():
    """Asked of another process: this one forks none that CUDA could harm, but its stages do."""
    command = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    return subprocess.run(command, capture_output=True).returncode == 0


def unpack(wheels, folder, parser):
    found = sorted(wheels.glob("megatron_core-*.whl"))
    if not found:
        parser.error(f"--wheels {wheels} has no megatron_core-*.whl.")
    with zipfile.ZipFile(found[-1]) as wheel:
        wheel.extractall(folder)
    return folder


def run(plan, rows, seconds, options, environment):
    """Runs a stage's parts, several at once where that disturbs none."""
    if options.rehearse and plan.interpreted:
        environment = environment | INTERPRETER
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(plan.at_once) as pool:
        for part in plan.parts:
            pool.submit(run_part, plan, part, rows, end, options, environment)


def run_part(plan, part, rows, end, options, environment):
    """A process; where it dies or does not end, that is a row."""
    left = end - time.monotonic()
    stage = Stage(plan.name, rows, left, options.rehearse, part)
    if left < 1:
        stage.add(part or plan.name, "cut")
        return
    command = [
        sys.executable,
        "-m",
        plan.module,
        "--stage",
        plan.name,
        "--rows",
        str(rows),
        "--seconds",
        str(left),
    ]
    command += ["--part", part] + (["--rehearse"] if options.rehearse else [])
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(left + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "cut"
        output.seek(0)
        last = output.read().strip().splitlines()[-3:]
        if status == "cut":
            problem = f"it was stopped in a case: {last}"
            stage.add(part or plan.name, "cut", problem=problem[-600:])
        elif status:
            stage.add(part or plan.name, "fail", problem=f"exit status {status}: {last}"[-600:])


def read(rows):
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def print_stage(name, rows, rehearse):
    """The stage's rows, those of many alike summed up."""
    rows = [row for row in rows if row["stage"] == name]
    counts = Counter(row["verdict"] for row in rows)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"\n== {name}: {summary or 'nothing'}{' (a rehearsal: no times)' if rehearse else ''}")
    for row in rows:
        if name in ("compile", "tests") and row["verdict"] == "pass":
            continue
        found = {k: v for k, v in row.items() if k not in ("stage", "case", "verdict", "kernels")}
        text = "  ".join(f"{k} {short(v)}" for k, v in found.items())
        print(f"{row['verdict']:<7} {row['case']:<46} {text}", flush=True)
        kernels = row.get("kernels", {})
        least = 0.02 * sum(values["ms"] for values in kernels.values())
        for kernel, values in kernels.items():
            if values["ms"] < least:
                continue
            text = "  ".join(f"{k} {short(v)}" for k, v in values.items())
            print(f"{'':<12}{kernel[:60]:<60} {text}", flush=True)


def short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(rows, chosen):
    """0 where nothing failed and the stages that prove something came to their end."""
    print()
    wrong = [row for row in rows if row["verdict"] == "fail"]
    proofs = ("compile", "correctness", "million", "tests", "memcheck", "training", "serving")
    cut = {row["stage"] for row in rows if row["verdict"] == "cut"}
    silent = {plan.name for plan in chosen} - {row["stage"] for row in rows}
    for stage in silent:
        print(f"{stage} left no row.")
    for stage in cut:
        print(f"{stage} was cut short by the time.")
    print(f"{len(rows)} rows, {len(wrong)} of them failed.")
    return 1 if wrong or silent or cut & set(proofs) else 0


if __name__ == "__main__":
    sys.exit(main())
