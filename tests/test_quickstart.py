"""The quickstart from the wheel, installed where nothing is but what it says it requires."""

import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quickstart
from conversion.fresh_environment import make_environment

ROOT = Path(__file__).parents[1]
KEYS = {
    *("parameters", "train_tokens", "tokens_per_second", "valid_loss"),
    *("unigram_loss", "bigram_loss", "checkpoint", "plot", "sample"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment's Python and the folder that the wheel was unpacked into."""
    folder = tmp_path_factory.mktemp("installed")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", folder],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    needed = [text for text in requires("megalodon-mcore") if not is_extra(text)]
    python, _ = make_environment(folder / "env", needed)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.check_output([python, "-c", code], text=True).strip()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, target], check=True)
    return python, target


def is_extra(text: str) -> bool:
    marker = Requirement(text).marker
    return marker is not None and "extra" in str(marker)


def run_here(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The example with this environment's Python, as fast as four layers go."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments],
        cwd=folder,
        env=os.environ
        | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("MMQ", "--pattern has 'Q'; with Megalodon it takes M (a block)"),
        ("**", "which has no Megalodon block (M); take one in"),
        ("M|M", "--pattern is M|M, but the quickstart trains in one process"),
    ],
)
def test_a_pattern_of_no_model_is_refused_in_a_sentence(pattern, words):
    with pytest.raises(SystemExit) as refused:
        quickstart.layer_arguments(pattern)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_quickstart_trains_and_samples_a_pattern(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples" / "quickstart.py").read_text() * 2)
    words = ("--text", str(text), "--out", "out", "--iterations", "1", "--pattern", "M*E")
    result = run_here(tmp_path, *words)
    assert result.returncode == 0, result.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.keys() >= KEYS and 1.0 < summary["valid_loss"] < 10.0
    for name in ("plot", "sample"):
        assert (tmp_path / summary[name]).stat().st_size > 100
    other = run_here(tmp_path, *words[:-2])
    assert other.returncode == 1 and "give --out another folder" in other.stderr


@pytest.mark.slow
def test_the_quickstart_writes_its_results_and_reuses_them(installed, tmp_path):
    python, target = installed
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples" / "quickstart.py").read_text() * 20)
    out = tmp_path / "out"

    def run(*arguments):
        return subprocess.run(
            [python, *map(str, arguments)],
            cwd=tmp_path,
            # Four steps do not pay for compiling, nor sizes like these for a second thread.
            env={
                **{"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
                **{"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
            },
            capture_output=True,
            text=True,
        )

    def quickstart(iterations=4):
        words = ("--text", text, "--out", "out", "--iterations", iterations)
        return run(ROOT / "examples" / "quickstart.py", *words)

    first = quickstart()
    assert first.returncode == 0, first.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert 2_500_000 < summary["parameters"] < 3_500_000
    assert summary["train_tokens"] == 4 * 8 * 512
    assert 1.0 < summary["valid_loss"] < 10.0
    assert summary["bigram_loss"] < summary["unigram_loss"]
    for name in ("plot", "sample"):
        assert (tmp_path / summary[name]).stat().st_size > 100

    log_size = (out / "train.log").stat().st_size
    second = quickstart()
    assert second.returncode == 0, second.stderr[-2000:]
    assert "Reusing the trained checkpoint" in second.stdout
    assert (out / "train.log").stat().st_size == log_size
    assert json.loads((out / "summary.json").read_text()) == summary

    other = quickstart(iterations=5)
    assert other.returncode == 1
    assert "give --out another folder" in other.stderr

    where = run("-c", "import megalodon_mcore.kernels as m; print(m.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(target)
