"""examples/nemo_run_recipe.py, as far as it goes without a cluster."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "nemo_run_recipe.py"


def is_installed():
    # Of a folder with that name that merely lies about there is no origin.
    found = importlib.util.find_spec("nemo_run")
    return found is not None and found.origin is not None


pytestmark = pytest.mark.skipif(
    not is_installed(), reason="NeMo-Run is not installed (pip install nemo-run 'leptonai<0.28')"
)


def submitted(tmp_path, *arguments):
    """What a dry run prints, in one line without NeMo-Run's wrapping."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "NEMORUN_HOME": str(tmp_path), "COLUMNS": "1000"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return " ".join(run.stdout.split())


def test_slurm_starts_torchrun_on_every_node_again_after_a_failure(tmp_path):
    printed = submitted(
        tmp_path,
        *("slurm", "--dry-run", "--nodes", "4", "--gpus", "8", "--account", "someone"),
        *("--job-dir", str(tmp_path), "--retries", "2"),
        *("pretrain-recipe", "7b-32k", "checkpoint.save=two words"),
    )
    for expected in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --account=someone"):
        assert expected in printed
    assert re.search(
        r"torchrun --rdzv-backend c10d .* --nnodes 4 --nproc-per-node 8 .*"
        r"-m megalodon_mcore pretrain-recipe 7b-32k 'checkpoint.save=two words'",
        printed,
    )
    assert "export TORCHX_MAX_RETRIES=2" in printed
    assert 'scontrol requeue "$SLURM_JOB_ID"' in printed


def test_slurm_needs_an_account_and_a_folder(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "slurm", "pretrain-recipe", "tiny"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "slurm needs --account and --job-dir" in run.stderr
